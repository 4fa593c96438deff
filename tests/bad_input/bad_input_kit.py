"""What the tests of bad input share: a small experiment's commands, its files, and ways to damage them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from gqa_scaling.costs import n_exact
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.runs import RunDirectory, run_directory

TINY = "experiments.tiny"
PLAN = ("plan", TINY, "--hardware", "v5e")
HUGE, LONG = str(10**30), "9" * 5000
TEXTS = ("--data.corpus", "texts")


def corpus(workplace: Path, documents: int = 40) -> Path:
    folder = workplace / "texts"
    folder.mkdir()
    for i in range(documents):
        (folder / f"{i}.txt").write_text(f"document {i} " * 30)
    return folder


def finished(workplace: Path) -> list[RunDirectory]:
    """The six runs of experiments.tiny, whose first two are finished; the third has failed."""
    runs = load_experiment(TINY).runs
    places = [run_directory("runs", "tiny", run) for run in runs]
    for number, (run, place) in enumerate(zip(runs[:3], places[:3], strict=True)):
        place.begin(run, {"store_hash": "s"})
        began = {"began": 1.8e9, "first_step": 0, "layout": {"device": "cpu"}}
        place.add_attempt(began)
        line = {"step": 5, "time": 1.8e9, "learning/loss": 3.0, "perf/step_time_seconds": 0.1}
        place.metrics_file.write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
        if number == 2:
            place.fail("Traceback\nValueError: no\n", "ValueError")
            continue
        result = {"n_exact": n_exact(run.model), "tokens": 1280, "data": {"store_hash": "s"}}
        judged = {run.evaluation_digest: {"loss": 2.5 + number / 10, "hash": "e"}}
        place.finish(result | {"evaluations": judged}, {"finished": 1.8e9})
    return places


def shape(**changes: object) -> Callable[[bytes], bytes]:
    """The same JSON with fields at the top replaced; those made ... are left out."""

    def change(content: bytes) -> bytes:
        whole = json.loads(content) | changes
        return json.dumps({k: v for k, v in whole.items() if v is not ...}).encode()

    return change


ANY: dict[str, Callable[[bytes], bytes]] = {
    "list": lambda content: b"[]",
    "null": lambda content: b"null",
    "number": lambda content: b"3",
    "text": lambda content: b'"x"',
    "table": lambda content: b"{}",
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "cut": lambda content: content[: len(content) // 2],
    "not-utf8": lambda content: b'{"a": "\xff"}',
    "utf16": lambda content: content.decode().encode("utf-16"),
    "deep": lambda content: b"[" * 100_000,
    "long-number": lambda content: b'{"a": ' + b"9" * 5000 + b"}",
    "twice": lambda content: content + content,
}


def files(folder: Path) -> dict[str, str]:
    """What lies below a folder: the hash of each file, the target of each link."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "__pycache__" in name:
            continue
        kind = "link " + os.readlink(path) if path.is_symlink() else "folder"
        plain = path.is_file() and not path.is_symlink()
        out[name] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else kind
    return out
