"""The run directory: where a run lives, what is in it, and who is working on it.

    runs/<experiment>/<run name>-<digest>/
        config.json      what was asked for; the truth
        claim.json       who is training it now
        metrics.jsonl    one line per logged step, and TensorBoard files beside it
        checkpoints/     the training state, while it trains
        attempts.jsonl   one line for each start: layout, versions, time
        failure.json     why it stopped, when it failed
        parameters/      the trained model
        result.json      written last, atomically: with it the run is done

No jax here: `plan`, `status` and `fit` read runs without it.
"""

import _thread
import contextlib
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from gqa_scaling.config import (
    SCHEMA_VERSION,
    RunConfig,
    UserError,
    differing_fields,
    require,
)
from gqa_scaling.fields import Shape, misfit
from gqa_scaling.files.storage import (
    NO_VERSION,
    as_path,
    failures_are_fine,
    is_remote,
    make_folder,
    modified,
    remove_folder,
    replace,
    require_folder,
    tail,
    version,
    write_atomic,
)

State = Literal["done", "running", "stale", "failed", "pending", "damaged"]
STALE_SECONDS = 600  # a claim from another machine that has not been renewed for this long
RENEW_SECONDS = 30
SETTLE_SECONDS = 5  # between taking a claim over and counting on it, where the server cannot decide


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


# What must be in the files, as far as anything reads it.
_ATTEMPT: Shape = {"began": float, "first_step": int, "layout": {"device": str}}
_LINE: Shape = {"step": int}  # further fields whose names hold a / are numbers
_RESULT: Shape = {
    "result": {
        "evaluations": {"*": {"loss": float, "hash?": str, "loss_by_position?": [float]}},
        "data?": {"tokenizer_hash?": str, "corpus_hash?": str, "store_hash?": str},
        "epochs?": (float,),
        "versions?": (dict,),
        "skipped_steps?": int,
    },
    "timing?": ({"training_seconds?": (float,), "finished?": float},),
    "attempts?": ([{"layout?": {"device?": str}}],),
}
_CONFIG: Shape = {"schema": int, "config": dict, "data": dict}
_FAILURE: Shape = {"kind": str, "traceback": str, "time": float}


def _parse(text: bytes, shape: Shape) -> tuple[Any, str]:
    """The JSON value, and what is wrong with it in words."""
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        return None, str(error)
    wrong = misfit(value, shape)
    if shape is _LINE and not wrong:
        numbers = {k: v for k, v in value.items() if "/" in k or k == "time"}
        # an evaluation on the way may be no number, and is logged as it is
        numbers = {k: v for k, v in numbers.items() if type(v) is not float or math.isfinite(v)}
        wrong = misfit(numbers, dict.fromkeys(numbers, float))
    return value, wrong


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _read(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


def read_json(path: Path, shape: Shape = dict, remedy: str = "remove it and run again") -> Any:
    """The JSON in a file; UserError names a damaged one, what is wrong, and the remedy."""
    value, wrong = _parse(_read(path), shape)
    require(not wrong, f"{path} is damaged ({wrong}); {remedy}")
    return value


def _json_lines(path: Path, shape: Shape) -> list[dict[str, Any]]:
    """The lines of a JSONL file but for a last one cut short; any other damage is named."""
    if not path.exists():
        return []
    lines, out = _read(path).splitlines(), []
    for number, line in enumerate(lines, 1):
        value, wrong = _parse(line, shape)
        cut_short = value is None and number == len(lines)
        damaged = f"{path} line {number} is damaged ({wrong}); remove that line from the file"
        require(not wrong or cut_short, damaged)
        out += [value] if not cut_short else []
    return out


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run, and what can be told of it from its files."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def failure_file(self) -> Path:
        return self.path / "failure.json"

    @property
    def claim_file(self) -> Path:
        return self.path / "claim.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def attempts_file(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def parameters(self) -> Path:
        return self.path / "parameters"

    def result(self) -> dict[str, Any] | None:
        """The whole result file, or None while the run is unfinished."""
        if not self.result_file.exists():
            return None
        made_anew = f"remove it, and the run makes it anew from {self.parameters}"
        return read_json(self.result_file, _RESULT, made_anew)

    def failure(self) -> dict[str, Any] | None:
        """Why the run stopped, or None where it has not failed."""
        try:
            return read_json(self.failure_file, _FAILURE, "remove it, and the run is tried again")
        except FileNotFoundError:  # it may be tried again just now
            return None

    def _stored(self) -> dict[str, Any]:
        stored = read_json(self.config_file, _CONFIG, "remove it, and the run writes it anew")
        require(
            stored["schema"] == SCHEMA_VERSION,
            f"{self.config_file} has schema {stored['schema']}, this version reads "
            f"{SCHEMA_VERSION}",
        )
        return stored

    def config(self) -> RunConfig:
        stored = self._stored()
        try:
            return RunConfig.from_dict(stored["config"])
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from None

    def begin(self, config: RunConfig, data: dict[str, Any]) -> None:
        """Create the directory, or check that the one there was made from the same run and data.

        Raises UserError naming what differs; nothing on disk is changed then.
        """
        if self.config_file.exists():
            changes = differing_fields(self.config(), config)
            require(not changes, f"{self.path} was made by another config: {'; '.join(changes)}")
            self.require_same_data(self._stored()["data"], data)
        make_folder(self.path)
        write_json(
            self.config_file,
            {
                "schema": SCHEMA_VERSION,
                "digest": config.digest,
                "config": config.to_dict(),
                "data": data,
            },
        )

    def require_same_data(self, before: dict[str, Any], data: dict[str, Any]) -> None:
        """Refuse tokens other than those the run was trained on, naming what differs."""
        changed = [k for k in sorted(data) if before.get(k) != data[k]]
        require(
            not changed,
            f"{self.path} was trained on other data ({', '.join(changed)} differ); prepare the "
            "same corpus again or remove the run",
        )

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines; a last line cut short by a kill is left out."""
        return _json_lines(self.metrics_file, _LINE)

    def last_metrics(self, tag: str) -> dict[str, Any]:
        """The last logged line that holds `tag`, read from the end of the file; {} if none."""
        if not self.metrics_file.exists():
            return {}
        with _reading(self.metrics_file):
            lines = tail(self.metrics_file, 8192).splitlines()
        for i, line in reversed(list(enumerate(lines))):
            values, wrong = _parse(line, _LINE)
            if not wrong and tag in values:
                return values
            if wrong and 0 < i < len(lines) - 1:  # the first and last may be cut
                self.metrics()  # names the damaged line
        return {}

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run will write again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        if self.metrics_file.exists():
            write_atomic(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def attempts(self) -> list[dict[str, Any]]:
        """One entry for each start of training."""
        return _json_lines(self.attempts_file, _ATTEMPT)

    def add_attempt(self, attempt: dict[str, Any]) -> None:
        lines = self.attempts() + [attempt]
        write_atomic(self.attempts_file, "".join(json.dumps(line) + "\n" for line in lines))

    def state(self) -> State:
        """How far the run is, by which files are there; whether one is damaged, who reads it says."""
        if self.result_file.exists():
            return "done"
        with _reading(self.claim_file):
            holder = _holder(self.claim_file)
        if holder is not None and not _is_stale(holder, self.claim_file, time.time()):
            return "running"
        if self.failure_file.exists():
            return "failed"
        return "stale" if holder is not None else "pending"

    def fail(self, text: str, kind: str) -> None:
        write_json(self.failure_file, {"kind": kind, "traceback": text, "time": time.time()})

    def finish(self, result: dict[str, Any], timing: dict[str, Any]) -> None:
        """Write result.json, then drop what only an unfinished run needs."""
        whole = {
            "schema": SCHEMA_VERSION,
            "result": result,
            "timing": timing,
            "attempts": self.attempts(),
        }
        write_json(self.result_file, whole)
        self.clean()

    def clean(self) -> None:
        """Finished runs keep parameters only; a kill between the two steps is mended here."""
        if self.checkpoints.exists():
            remove_folder(self.checkpoints)
        self.failure_file.unlink(missing_ok=True)


def runs_root() -> Path:
    """Where experiments keep their runs: $GQA_SCALING_RUNS, or ./runs.

    Raises UserError where a file is in the way of that folder.
    """
    text = os.environ.get("GQA_SCALING_RUNS", "runs")
    require(bool(text), "the folder of the runs is '' in --root or GQA_SCALING_RUNS: name one")
    root = as_path(text)
    if not is_remote(root):
        require_folder(root)
    return root


def run_directory(root: Path | str, experiment: str, run: RunConfig) -> RunDirectory:
    """runs/<experiment>/<run name>-<digest>. The digest alone identifies: a renamed run is found."""
    folder = as_path(root) / experiment
    wanted = folder / f"{run.name}-{run.digest}"
    if not wanted.exists():
        renamed = sorted(folder.glob(f"*-{run.digest}"))
        if renamed:
            return RunDirectory(renamed[0])
    return RunDirectory(wanted)


# ---------------------------------------------------------------------------------- claims


# What a claim file says; who holds one that says anything else cannot be told.
DAMAGED = {"host": "", "pid": 0, "born": "", "token": ""}


def _holder(claim: Path) -> dict[str, Any] | None:
    """What the claim says of its holder: None where there is no claim, DAMAGED where it is garbage."""
    try:
        holder = json.loads(claim.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # no JSON, no text, or brackets without end
        return DAMAGED
    if not isinstance(holder, dict):
        return DAMAGED
    told = all(type(holder.get(key)) is type(value) for key, value in DAMAGED.items())
    # the host is printed: what a terminal would obey is no name of one
    good = told and 0 < holder["pid"] < 2**31 and holder["host"].isprintable()
    return holder if good else DAMAGED


def _born(pid: int) -> str:
    """When a process began, so that a reused pid is not mistaken for the claimant.

    "ended" for one that is dead and waits for its parent; "" where it cannot be told.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def _alive(pid: int, born: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there is such a process, somebody else's
    return _born(pid) in ("", born)


def _host(claim: Path) -> str:
    """This machine's name; in a bucket, where names may be those of strangers, this boot's too."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not is_remote(claim) or not boot.exists():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()}"


def _is_stale(holder: dict[str, Any], claim: Path, now: float) -> bool:
    """Whether nobody is at the run any more; `now` is by the clock that dates the claim."""
    if holder["host"] == _host(claim):
        if not _alive(holder["pid"], holder["born"]):
            return True
        if holder["born"]:
            return False  # surely the same process, even one that was asleep
    try:
        # One dated in the future was not renewed just now either.
        return abs(now - modified(claim)) > _patience(holder)
    except FileNotFoundError:
        return True


def _patience(holder: dict[str, Any]) -> float:
    """Seconds after which a claim that was not renewed is stale.

    A holder that no longer finds its own claim stops when it would renew it, so nobody is at a run
    whose claim has been garbage for longer than that.
    """
    return 2 * RENEW_SECONDS if holder is DAMAGED else STALE_SECONDS


def waited_for(directory: RunDirectory) -> str | None:
    """Who holds the run and until when, in words; None where a live process of this machine does."""
    file = directory.claim_file
    holder = _holder(file)
    if holder is None or (holder["born"] and holder["host"] == _host(file)):
        return None
    try:
        until = modified(file) + _patience(holder)
    except FileNotFoundError:  # it was given back just now
        return None
    who = f"its claim {file} is damaged"
    if holder is not DAMAGED:
        who = f"process {holder['pid']} of {holder['host']} is at it"
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(until))
    return f"{who}; it is taken over at {clock} unless the claim is renewed before"


def _take(directory: RunDirectory, mine: dict[str, Any]) -> bool:
    """Claim the run unless somebody is at it. Of several that try at once, one has it."""
    file = directory.claim_file
    if is_remote(file):
        return _take_object(file, mine)
    make_folder(directory.path)
    with open(directory.path / ".claim.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # judging and taking over is one step
        holder = _holder(file)
        free = holder is None or _is_stale(holder, file, _touched(guard))
        if free:
            write_json(file, mine)
    return free


def _touched(guard: TextIO) -> float:
    """The time now by the clock of the disk, which machines that share one may not have."""
    os.utime(guard.fileno())
    return os.fstat(guard.fileno()).st_mtime


def _take_object(file: Path, mine: dict[str, Any]) -> bool:
    """The same in a bucket, whose server settles which of several that try at once has it.

    Where it cannot, the last that writes has it, and the others see that once all have written.
    """
    seen = version(file)  # before it is read: what is replaced is then what was judged
    holder = _holder(file)
    if holder is not None and not _is_stale(holder, file, time.time()):
        return False
    if seen is not None and replace(file, json.dumps(mine), NO_VERSION):
        time.sleep(SETTLE_SECONDS)
        return _is_mine(file, mine)
    # a request that was sent again after its answer got lost finds our own
    return replace(file, json.dumps(mine), seen) or _is_mine(file, mine)


def _is_mine(file: Path, mine: dict[str, Any]) -> bool:
    holder = _holder(file)
    return holder is not None and holder["token"] == mine["token"]


@contextlib.contextmanager
def claim(directory: RunDirectory) -> Iterator[bool]:
    """Hold the run while training it. Yields False when somebody else is at it.

    A claim is stale when its process is gone (same machine) or it has not been renewed for
    `STALE_SECONDS` (another machine); a stale one is taken over. A thread renews ours.
    """
    file, pid = directory.claim_file, os.getpid()
    mine = {"host": _host(file), "pid": pid, "born": _born(pid), "token": uuid.uuid4().hex}
    if not _take(directory, mine):
        yield False
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            with failures_are_fine():  # a disk that is away for a moment may come back
                seen = version(file) if is_remote(file) else None
                holder = _holder(file)
                if holder is not None and holder["token"] != mine["token"]:
                    how = "its claim is damaged" if holder is DAMAGED else "taken over while asleep"
                    print(f"{directory.path}: {how}, stopping", file=sys.stderr)
                    _thread.interrupt_main()
                    return
                if is_remote(file):  # the time makes it another version
                    replace(file, json.dumps({**mine, "renewed": time.time()}), seen)
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
