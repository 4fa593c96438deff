"""Who is at a run: a claim file that one process holds, renews and gives back.

A claim is stale when its process is gone, which can be told where its pid means the same, or it has
not been renewed for `STALE_SECONDS`; whoever finds a stale claim takes it over. On a disk a lock makes
judging and taking over one step; in a bucket the server refuses a write that is based on what is
there no more.
"""

import _thread
import contextlib
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TextIO

from gqa_scaling.files.failures import failures_are_fine
from gqa_scaling.files.storage import (
    NO_VERSION,
    is_remote,
    make_folder,
    modified,
    replace,
    version,
    write_json,
)

STALE_SECONDS = 600  # a claim from elsewhere that has not been renewed for this long
RENEW_SECONDS = 30
LOCK = ".claim.lock"  # stays beside a claim that was given back
SETTLE_SECONDS = 5  # between taking a claim over and counting on it, where the server cannot decide


@dataclass(frozen=True)
class Holder:
    """The process that holds a claim; `token` tells this claim from others of the same process.

    `host` is where its pid means something, see `_host`; older versions wrote less there, so their
    claims are judged by their age.
    """

    host: str
    pid: int
    born: str
    token: str


# The holder of a claim whose file says anything else: who it is cannot be told.
DAMAGED = Holder("", 0, "", "")


@contextlib.contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Hold the claim in this file while training the run beside it; yields False when it is held.

    A thread renews the claim. When it finds that somebody else took it over, or garbage in its place
    or nothing, as after somebody took it over and gave it back, it interrupts the main thread.
    """
    pid = os.getpid()
    mine = Holder(_host(), pid, _born(pid), os.urandom(16).hex())
    if not _take(file, mine):
        yield False
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            with failures_are_fine():  # a disk that is away for a moment may come back
                seen = version(file) if is_remote(file) else None
                holder = _read(file)
                if holder is None or holder.token != mine.token:
                    how = "gone" if holder is None else "taken over while asleep"
                    how = "damaged" if holder is DAMAGED else how
                    print(f"{file.parent}: its claim is {how}, stopping", file=sys.stderr)
                    _thread.interrupt_main()
                    return
                if is_remote(file):  # the time makes it another version
                    replace(file, json.dumps({**asdict(mine), "renewed": time.time()}), seen)
                else:
                    os.utime(file)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        with failures_are_fine() if is_remote(file) else contextlib.nullcontext():
            if _is_mine(file, mine):  # else it was taken over
                file.unlink(missing_ok=True)


def claim_state(file: Path) -> Literal["free", "held", "stale"]:
    """Whether anybody is at the run beside this file, by this machine's clock."""
    holder = _read(file)
    if holder is None:
        return "free"
    return "stale" if _is_stale(holder, file, time.time()) else "held"


def waited_for(file: Path) -> str | None:
    """Who holds the claim and until when, in words; None where a live process of this host does."""
    holder, until = _read(file), held_until(file)
    if holder is None or until is None:
        return None
    who = f"its claim {file} is damaged"
    if holder is not DAMAGED:
        who = f"process {holder.pid} of {holder.host.partition(' ')[0]} is at it"
    return f"{who}; it is taken over at {clock(until)} unless the claim is renewed before"


def held_until(file: Path) -> float | None:
    """When the claim ends unless it is renewed; None where it ends with a process of this host, or is
    not there."""
    holder = _read(file)
    if holder is None or (holder.born and holder.host == _host()):
        return None
    try:
        return modified(file) + _patience(holder)
    except FileNotFoundError:  # it was given back just now
        return None


def clock(seconds: float) -> str:
    """A time as people read it, by this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# ------------------------------------------------------------------------- taking a claim


def _take(file: Path, mine: Holder) -> bool:
    """Take the claim unless somebody is at the run. Of several that try at once, one has it."""
    if is_remote(file):
        return _take_object(file, mine)
    make_folder(file.parent)
    with open(file.parent / LOCK, "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # judging and taking over is one step
        holder = _read(file)
        free = holder is None or _is_stale(holder, file, _touched(guard))
        if free:
            write_json(file, asdict(mine))
    return free


def _take_object(file: Path, mine: Holder) -> bool:
    """The same in a bucket, whose server settles which of several that try at once has it.

    Where it cannot, the last that writes has it, and the others see that once all have written.
    """
    seen = version(file)  # before it is read: what is replaced is then what was judged
    holder, text = _read(file), json.dumps(asdict(mine))
    if holder is not None and not _is_stale(holder, file, time.time()):
        return False
    if seen is not None and replace(file, text, NO_VERSION):
        time.sleep(SETTLE_SECONDS)
        return _is_mine(file, mine)
    # a request that was sent again after its answer got lost finds our own
    return replace(file, text, seen) or _is_mine(file, mine)


def _touched(guard: TextIO) -> float:
    """The time now by the clock of the disk, which machines that share one may not have."""
    os.utime(guard.fileno())
    return os.fstat(guard.fileno()).st_mtime


# ------------------------------------------------------------------------- judging a claim


def _read(file: Path) -> Holder | None:
    """The holder that the claim names: None where there is no claim, DAMAGED where it is garbage."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # no JSON, no text, or brackets without end
        return DAMAGED
    fields = asdict(DAMAGED)
    if not isinstance(told, dict) or any(type(told.get(k)) is not type(fields[k]) for k in fields):
        return DAMAGED
    holder = Holder(**{name: told[name] for name in fields})
    # the host is printed: what a terminal would obey is no name of one
    return holder if 0 < holder.pid < 2**31 and holder.host.isprintable() else DAMAGED


def _is_mine(file: Path, mine: Holder) -> bool:
    holder = _read(file)
    return holder is not None and holder.token == mine.token


def _is_stale(holder: Holder, file: Path, now: float) -> bool:
    """Whether nobody is at the run any more; `now` is by the clock that dates the claim."""
    if holder.host == _host():
        if not _alive(holder):
            return True
        if holder.born:
            return False  # surely the same process, even one that was asleep
    try:
        # One dated in the future was not renewed just now either.
        return abs(now - modified(file)) > _patience(holder)
    except FileNotFoundError:
        return True


def _patience(holder: Holder) -> float:
    """Seconds after which a claim that was not renewed is stale.

    A holder that no longer finds its own claim stops when it would renew it, so nobody is at a run
    whose claim has been garbage for longer than that.
    """
    return 2 * RENEW_SECONDS if holder is DAMAGED else STALE_SECONDS


def _host() -> str:
    """Where pids mean what they mean here: this machine's name, its boot and the PID namespace.

    Machines that share a disk or a bucket may share a name, and containers that of their machine.
    """
    name, boot = os.uname().nodename, Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():  # no Linux
        return name
    return f"{name} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _alive(holder: Holder) -> bool:
    """Whether the holder's process, of this host, is still there."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there is such a process, somebody else's
    return _born(holder.pid) in ("", holder.born)


def _born(pid: int) -> str:
    """When a process began, so that a reused pid is not mistaken for the claimant.

    "ended" for one that is dead and waits for its parent; "" where it cannot be told.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]
