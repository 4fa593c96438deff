"""The run directory: where a run lives and what is in it.

    runs/<experiment>/<run name>-<digest>/
        config.json      what was asked for; the truth
        claim.json       who is training it now
        metrics.jsonl    one line per logged step, and TensorBoard files beside it
        checkpoints/     the training state, while it trains
        attempts.jsonl   one line for each start: layout, versions, time
        failure.json     why it stopped, when it failed
        parameters/      the trained model
        averaged-K/      the mean over its last states, where the evaluation asks for one
        judged.json      parts of its evaluation as they become known, where it has several
        result.json      written last, atomically: with it the run is done
        curves.json      in place of metrics.jsonl, of a run put back from a kept study (`study/records.py`),
                         which has its result and no parameters

Beside them lies what was said of runs before they began (`forecasts`).

No jax here: `plan`, `status` and `fit` read runs without it.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gqa_scaling.config import (
    DIGEST_LENGTH,
    SCHEMA_VERSION,
    RunConfig,
    UserError,
    differing_fields,
    require,
)
from gqa_scaling.fields import JsonShape, misfit
from gqa_scaling.files.claims import claim, claim_state
from gqa_scaling.files.storage import (
    as_path,
    is_remote,
    make_folder,
    remove_folder,
    require_folder,
    sizes,
    tail,
    write_atomic,
    write_json,
)

State = Literal["done", "running", "stale", "failed", "pending", "damaged"]

# What must be in the files, as far as anything reads it.
_ATTEMPT: JsonShape = {"began": float, "first_step": int, "layout": {"device": str}}
_LINE: JsonShape = {"step": int}  # further fields whose names hold a / are numbers
_FURTHER: JsonShape = {
    "loss_of_first_reading?": float,
    "loss_of_second_reading?": float,
    "loss_by_context?": {"*": float},
    "needles?": {"form": str, "trials": int, "depths": [float], "accuracy": {"*": [float]}},
}
RESULT: JsonShape = {
    "result": {
        "evaluations": {
            "*": {"loss": float, "hash?": str, "loss_by_position?": [float], **_FURTHER}
        },
        "data?": {"tokenizer_hash?": str, "corpus_hash?": str, "store_hash?": str},
        "epochs?": (float,),
        "train_loss?": (float,),
        "versions?": (dict,),
        "skipped_steps?": int,
    },
    "timing?": ({"training_seconds?": (float,), "finished?": float},),
    "attempts?": ([{"layout?": {"device?": str}}],),
}
_CONFIG: JsonShape = {"schema": int, "config": dict, "data": dict}
_FAILURE: JsonShape = {"kind": str, "traceback": str, "time": float}


def parse_json(text: bytes, shape: JsonShape) -> tuple[Any, str]:
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
    """Have a file that this user cannot read, or that is a folder, told by its name as UserError."""
    try:
        yield
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _read(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


def read_json(path: Path, shape: JsonShape = dict, remedy: str = "remove it and run again") -> Any:
    """The JSON in a file; UserError names a damaged one, what is wrong, and the remedy."""
    value, wrong = parse_json(_read(path), shape)
    require(not wrong, f"{path} is damaged ({wrong}); {remedy}")
    return value


def require_schema(path: Path, said: dict[str, Any], schema: int) -> None:
    """Refuse what another version has written into a file."""
    require(
        said["schema"] == schema, f"{path} has schema {said['schema']}, this version reads {schema}"
    )


def _json_lines(path: Path, shape: JsonShape) -> list[dict[str, Any]]:
    """The lines of a JSONL file but for a last one cut short; any other damage is named."""
    if not path.exists():
        return []
    lines, out = _read(path).splitlines(), []
    for number, line in enumerate(lines, 1):
        value, wrong = parse_json(line, shape)
        cut_short = value is None and number == len(lines)
        damaged = f"{path} line {number} is damaged ({wrong}); remove that line from the file"
        require(not wrong or cut_short, damaged)
        out += [value] if not cut_short else []
    return out


def _write_json_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


@dataclass
class RunDirectory:
    """The paths of one run, and what can be told of it from its files."""

    path: Path

    def __post_init__(self) -> None:
        self.config_file = self.path / "config.json"
        self.claim_file = self.path / "claim.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.attempts_file = self.path / "attempts.jsonl"
        self.failure_file = self.path / "failure.json"
        self.parameters = self.path / "parameters"
        self.judged_file = self.path / "judged.json"
        self.result_file = self.path / "result.json"
        self.curves_file = self.path / "curves.json"

    def averaged(self, run: RunConfig) -> Path:
        """Where the mean over the run's last states lies, as many as its evaluation asks for."""
        return self.path / f"averaged-{run.evaluation.average}-every-{run.checkpoint.every_steps}"

    def result(self) -> dict[str, Any] | None:
        """The whole result file, or None while the run is unfinished."""
        if not self.result_file.exists():
            return None
        made_anew = f"remove it, and the run makes it anew from {self.parameters}"
        again = "remove it, and put the kept study back again"
        return read_json(self.result_file, RESULT, again if self.is_restored() else made_anew)

    def is_restored(self) -> bool:
        """Whether the run was put back from a kept study, and not trained here since: it has no parameters."""
        return self.curves_file.exists() and not self.metrics_file.exists()

    def failure(self) -> dict[str, Any] | None:
        """Why the run stopped, or None where it has not failed."""
        try:
            return read_json(self.failure_file, _FAILURE, "remove it, and the run is tried again")
        except FileNotFoundError:  # it may be tried again just now
            return None

    def _stored(self) -> dict[str, Any]:
        stored = read_json(self.config_file, _CONFIG, "remove it, and the run writes it anew")
        require_schema(self.config_file, stored, SCHEMA_VERSION)
        return stored

    def config(self) -> RunConfig:
        """What was asked for. Raises UserError where this version cannot read it."""
        stored = self._stored()
        try:
            return RunConfig.from_dict(stored["config"])
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from None

    def data(self) -> dict[str, Any]:
        """What is known of the tokens that the run was begun with."""
        return self._stored()["data"]

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
            values, wrong = parse_json(line, _LINE)
            if not wrong and tag in values:
                return values
            if wrong and 0 < i < len(lines) - 1:  # the first and the last may be cut short
                self.metrics()  # raises, and names the damaged line
        return {}

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run will write again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        if self.metrics_file.exists():
            _write_json_lines(self.metrics_file, kept)

    def attempts(self) -> list[dict[str, Any]]:
        """One entry for each start of training."""
        return _json_lines(self.attempts_file, _ATTEMPT)

    def add_attempt(self, attempt: dict[str, Any]) -> None:
        """Note a start of training; the file is replaced as a whole."""
        _write_json_lines(self.attempts_file, [*self.attempts(), attempt])

    def begun(self) -> bool:
        """Whether a process was ever at this run: all but the lock of a claim given back, and files that
        a kill left half written, says so."""
        return any(not name.startswith(".") for name in sizes(self.path))

    def state(self) -> State:
        """How far the run is, by which files are there. None but the claim is read here."""
        if self.result_file.exists():
            return "done"
        with _reading(self.claim_file):
            claim = claim_state(self.claim_file)
        if claim == "held":
            return "running"
        if self.failure_file.exists():
            return "failed"
        return "stale" if claim == "stale" else "pending"

    def fail(self, text: str, kind: str) -> None:
        """Record why the run stopped: the traceback and the name of the error's type."""
        write_json(self.failure_file, {"kind": kind, "traceback": text, "time": time.time()})

    def finish(
        self, result: dict[str, Any], timing: dict[str, Any], kept_steps: Collection[int] = ()
    ) -> None:
        """Write result.json, then drop what only an unfinished run needs, see `clean`."""
        self.write_result(result, timing)
        self.clean(kept_steps)

    def write_result(self, result: dict[str, Any], timing: dict[str, Any]) -> None:
        """Write result.json, with which a failure before it is over."""
        whole = {
            "schema": SCHEMA_VERSION,
            "result": result,
            "timing": timing,
            "attempts": self.attempts(),
        }
        write_json(self.result_file, whole)
        self.failure_file.unlink(missing_ok=True)

    def put_back(
        self, config: RunConfig, whole: dict[str, Any], curves: dict[str, dict[str, Any]]
    ) -> bool:
        """Make this the directory of a run that was finished elsewhere, whose result.json is `whole`.

        False, and nothing is changed, where the run has begun here. A kill leaves what another call completes.
        """
        if self.result_file.exists():
            return False
        make_folder(self.path)
        with claim(self.claim_file) as mine:
            here = {name for name in sizes(self.path) if not name.startswith(".")}
            here.discard(self.claim_file.name)
            interrupted = {
                each.name for each in (self.curves_file, self.config_file, self.attempts_file)
            }
            if not mine or (here and not self.curves_file.name in here <= interrupted):
                return False
            write_json(self.curves_file, curves)
            self.begin(config, whole["result"].get("data", {}))
            attempts = [each for each in whole.get("attempts") or () if not misfit(each, _ATTEMPT)]
            _write_json_lines(self.attempts_file, attempts)
            write_json(self.result_file, whole)
        return True

    def forget_judgements(self) -> None:
        """Drop what was kept of evaluations of other parameters."""
        self.judged_file.unlink(missing_ok=True)
        for folder in self.path.glob("averaged-*"):
            remove_folder(folder)

    def clean(self, kept_steps: Collection[int] = ()) -> None:
        """Drop what a finished run does not need; a kill since its result was written left it.

        The states of `kept_steps` are kept: other runs begin with them (`experiment/branches.py`).
        """
        if self.checkpoints.exists() and not kept_steps:
            remove_folder(self.checkpoints)
        for folder in self.checkpoints.iterdir() if self.checkpoints.exists() else ():
            if folder.is_dir() and folder.name not in map(str, kept_steps):
                remove_folder(folder)
        self.failure_file.unlink(missing_ok=True)


def evaluation_in(whole: dict[str, Any] | None, evaluation: str) -> dict[str, Any] | None:
    """What a result.json tells of the evaluation of this digest; None where there is none of it."""
    return whole["result"]["evaluations"].get(evaluation) if whole else None


def runs_root(named: str | None = None) -> Path:
    """Where experiments keep their runs: the folder that --root names, $GQA_SCALING_RUNS, or ./runs.

    Called where a command begins; what it calls is passed the path. Raises UserError where a file
    is in the way of that folder.
    """
    text = os.environ.get("GQA_SCALING_RUNS", "runs") if named is None else named
    require(bool(text), "the folder of the runs is '' in --root or GQA_SCALING_RUNS: name one")
    root = as_path(text)
    if not is_remote(root):
        require_folder(root)
    return root


def runs_in(folder: Path) -> list[RunDirectory]:
    """The run whose folder this is, or those that lie in it. Raises UserError where there are none."""
    one = (folder / "config.json").exists()
    found = [folder] if one else sorted(file.parent for file in folder.glob("*/config.json"))
    require(bool(found), f"{folder} is neither a run nor a folder of runs: no config.json")
    return [RunDirectory(each) for each in found]


def parent_directory(directory: RunDirectory, run: RunConfig) -> RunDirectory | None:
    """The directory of the run that a run starts from, below the same root; None without one."""
    if run.start_from is None:
        return None
    experiment, _, name = run.start_from.rpartition("/")
    folder = directory.path.parent.parent / experiment
    found = sorted(folder.glob(f"*{run.start_from[-DIGEST_LENGTH:]}"))
    return RunDirectory(found[0] if found else folder / name)


def run_directory(root: Path | str, experiment: str, run: RunConfig) -> RunDirectory:
    """runs/<experiment>/<run name>-<digest>. The digest alone identifies: a renamed run is found."""
    return directory_of(root, experiment, run.name, run.digest)


def run_directories(
    root: Path | str, experiment: str, runs: Sequence[RunConfig]
) -> list[RunDirectory]:
    """`run_directory` of each run, for one listing of their folder instead of a look for each."""
    folder, names = as_path(root) / experiment, dict[str, list[str]]()
    for path in folder.glob("*"):
        names.setdefault(path.name[-DIGEST_LENGTH - 1 :], []).append(path.name)

    def found(run: RunConfig) -> str:
        wanted, alike = f"{run.name}-{run.digest}", names.get(f"-{run.digest}", [])
        return wanted if wanted in alike or not alike else min(alike)

    return [RunDirectory(folder / found(run)) for run in runs]


def directory_of(root: Path | str, experiment: str, name: str, digest: str) -> RunDirectory:
    """The same of a run that is known by its name and its digest."""
    folder = as_path(root) / experiment
    wanted = folder / f"{name}-{digest}"
    if not wanted.exists():
        renamed = sorted(folder.glob(f"*-{digest}"))
        if renamed:
            return RunDirectory(renamed[0])
    return RunDirectory(wanted)
