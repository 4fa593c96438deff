"""The processes of one job: joining them, agreeing, stopping together when preempted.

Exit codes that a launcher can act on: 0 done; 75 preempted, saved, start again; 1 a bug, do not
start again; 70 the same, but recorded, so that the other runs can be gone on with; 2 the user can mend it; 134, 137 and 143 a peer died, start again.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from gqa_scaling.config import UserError, require
from gqa_scaling.devices.compiler_flags import keep_native_atomics

EXIT_MENDABLE = 2
EXIT_RUN_FAILED = 70  # EX_SOFTWARE of <sysexits.h>
EXIT_PREEMPTED = 75  # EX_TEMPFAIL
HEARTBEAT_SECONDS = 30  # a process not heard from for so long is taken for dead, and all end

_calls = itertools.count()
_told_to_stop = False


class RunFailed(Exception):
    """A run failed, for the reason that is its cause, and that is recorded; the other processes are lost."""


class Preempted(Exception):
    """The job was told to stop and its state is saved; the same command continues."""


def join(alone: bool = False) -> None:
    """Join the processes of this job, before jax touches a device; `alone` looks for no others.

    They are told of by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by Cloud
    TPU, SLURM or GKE. A job of one process joins itself: only then does SIGTERM lead to a saved
    step. Raises UserError when the three variables are incomplete, or a cluster is there that
    does not tell enough. A process whose devices do not start ends here, with 2 and one line: its
    peers may wait for it.
    """
    if jax.distributed.is_initialized():
        return
    _join(alone)
    try:
        require_platform()
    except UserError as error:
        print(f"gqa-scaling: {error}", file=sys.stderr)
        leave(EXIT_MENDABLE)


def require_platform() -> None:
    """Raise UserError unless jax runs on the first platform that JAX_PLATFORMS names.

    Where a machine has no such accelerator jax goes on with the next platform of the list, or
    raises, and a job that is paid for an accelerator would train on the CPU.
    """
    keep_native_atomics()  # the compiler reads its flags when jax starts
    named = os.environ.get("JAX_PLATFORMS", "")
    wanted = named.partition(",")[0]
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError: it tried none of them
        words = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        problem = f"jax cannot start it ({words})" if words else "jax sees none here"
    else:
        if not wanted or found == {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted):
            return
        problem = f"jax sees none here and would run on the {found}"
    raise UserError(
        f"JAX_PLATFORMS={named!r} asks for {wanted or 'any device'}, but {problem}; see that the "
        "machine has the device, its driver and a jax for it, or set JAX_PLATFORMS=cpu"
    )


def _join(alone: bool) -> None:
    _stop_with_supervisor()
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if any(given) and not alone:
        missing = [name for name, value in zip(names, given, strict=True) if not value]
        require(
            not missing, f"{', '.join(missing)} must be set, as others of {', '.join(names)} are"
        )
        for name, value in zip(names[1:], given[1:], strict=True):
            require(str(value).isdecimal(), f"{name}={value!r} must be a whole number")
        address, processes, process = str(given[0]), int(str(given[1])), int(str(given[2]))
        require(
            process < processes,
            f"JAX_PROCESS_ID={process} must be less than JAX_NUM_PROCESSES={processes}",
        )
        _past_proxies(address.rpartition(":")[0])
        return _initialize(
            coordinator_address=address,
            num_processes=processes,
            process_id=process,
            cluster_detection_method="deactivate",
        )
    tasks = os.environ.get("SLURM_NTASKS")
    if not alone and tasks != "1":
        # jax would show each task one device, also where it has a node to itself
        whole_nodes = tasks is not None and tasks == os.environ.get("SLURM_STEP_NUM_NODES")
        try:
            return _initialize(local_device_ids=[] if whole_nodes else None)
        except Exception as error:
            if "coordinator_address should be defined" not in str(error):  # that is: no cluster
                raise UserError(
                    f"the processes of this job cannot be told ({error}); set {names[0]}=host:port, "
                    f"{names[1]} and {names[2]}, for one alone localhost:1234, 1 and 0"
                ) from error
    address = f"127.0.0.1:{free_port()}"
    _past_proxies("127.0.0.1")
    _initialize(
        coordinator_address=address,
        num_processes=1,
        process_id=0,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=10**6,  # it may be suspended, and has no peer to lose
    )


def _initialize(**settings: Any) -> None:
    jax.distributed.initialize(**{"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, **settings})


def _stop_with_supervisor() -> None:
    """On Linux: SIGTERM to this process, which then saves and stops, when its supervisor is gone."""
    supervisor = os.environ.get("GQA_SCALING_SUPERVISOR")
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if supervisor is None or prctl is None:
        return
    set_death_signal = 1  # <sys/prctl.h>
    prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != int(supervisor):  # it was gone before
        os.kill(os.getpid(), signal.SIGTERM)


def _past_proxies(host: str) -> None:
    """Have gRPC reach the coordinator directly where http_proxy is set, of which jax would warn."""
    jax.config.update("jax_check_proxy_envs", False)
    name = "no_grpc_proxy"  # gRPC's own spelling
    others = os.environ.get(name)
    os.environ[name] = f"{others},{host}" if others else host


def end_with(parent: int) -> None:
    """Have this process end within a second of its parent, whatever ended that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def wait_to_end() -> None:
    """After a failed collective: a peer may be lost, and then jax ends this process with 134.

    Returns when none was.
    """
    time.sleep(HEARTBEAT_SECONDS + 3)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def joined() -> bool:
    """Whether this process belongs to a job, which may have no other."""
    return jax.distributed.is_initialized()


def several() -> bool:
    """Whether this job has other processes."""
    return joined() and jax.process_count() > 1


def is_leader() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def leaders(value: int) -> int:
    """The number that the leader passed, on every process; all must call this."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def agree(value: int) -> bool:
    """Whether the number is the same on every process; all must call this."""
    return len(np.unique(multihost_utils.process_allgather(np.int32(value)))) == 1


def wait_for_all(what: str) -> None:
    """Return when every process has come to the place that `what` names."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def preempted() -> bool:
    """Whether to save and stop, since SIGTERM reached one of the processes.

    All must ask equally often; the answer turns true at the same call on each, and stays so.
    """
    global _told_to_stop
    _told_to_stop |= multihost_utils.reached_preemption_sync_point(next(_calls))
    return _told_to_stop


def leave(code: int) -> NoReturn:
    """End this process at once: at exit it would wait minutes for peers that wait for it, and for
    threads that wait for a disk or a server."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it may lie on the full disk that ends us
            stream.flush()
    os._exit(code)
