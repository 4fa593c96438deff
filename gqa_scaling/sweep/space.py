"""What lies on disk below the folder of the runs and in this machine's caches, and what of it can go.

Nothing is removed of a run that a process is at, and no result ever: what goes is what a finished run no
longer needs, what nobody will go on with, and what is made again when it is needed. A folder is first
renamed into `.removing` beside it, at one stroke, so that a kill leaves it whole or gone for all others.
"""

import contextlib
import errno
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gqa_scaling.config import RunConfig, UserError
from gqa_scaling.files.claims import claim
from gqa_scaling.files.forecasts import FOLDER as FORECASTS
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.files.storage import (
    as_path,
    cache_folder,
    is_remote,
    modified,
    remove_folder,
    sizes,
)
from gqa_scaling.units import count

ASIDE = ".removing"
Kind = Literal["checkpoints", "digests", "compiled", "tokens", "leftovers"]  # that can go
KINDS: dict[Kind, str] = {
    "checkpoints": "checkpoints of finished runs",
    "digests": "unfinished runs that the named experiments do not declare",
    "compiled": "compiled programs, which are compiled again",
    "tokens": "copies of tokens that lie in a bucket, which are copied again",
    "leftovers": "what an earlier clean was at when it was ended",
}


@dataclass(frozen=True)
class Space:
    """Files of one kind in one place; `newest` in seconds since 1970, None where it is not told."""

    place: str
    kind: str
    files: int
    bytes: int
    newest: float | None


@dataclass(frozen=True)
class Removal:
    """A folder that can go, and why. `run` is the run that has to be held meanwhile, None for no run."""

    kind: Kind
    path: str
    why: str
    files: int
    bytes: int
    run: str | None = None


def survey(root: Path) -> list[Space]:
    """What lies below the folder of the runs and in this machine's caches, by place and kind, the
    largest place first. In a bucket times are not told."""
    found: dict[tuple[str, str], list[tuple[int, float | None]]] = {}
    listed = _listed(root)
    runs = {name.rpartition("/")[0] for name in listed if name.count("/") == 2}
    runs = {run for run in runs if f"{run}/config.json" in listed}
    for name, what in listed.items():
        found.setdefault(_place_and_kind(name, runs), []).append(what)
    for place, kind in _elsewhere(root, runs):
        elsewhere = list(_listed(as_path(place)).values())
        if elsewhere:
            found[place, kind] = elsewhere
    out = []
    for (place, kind), files in found.items():
        newest = max((time for _, time in files if time is not None), default=None)
        out.append(Space(place, kind, len(files), sum(size for size, _ in files), newest))
    total = {place: sum(each.bytes for each in out if each.place == place) for place, _ in found}
    return sorted(out, key=lambda each: (-total[each.place], each.place, -each.bytes))


def removals(
    root: Path,
    declared: Mapping[str, Iterable[str]],
    kinds: Iterable[Kind],
    branched: Container[str] = (),
) -> tuple[list[Removal], list[str]]:
    """What can go of these kinds, and lines on what stays that one might expect to go.

    `declared` holds, by experiment, the digests of its runs: unfinished runs of these experiments that
    have another digest can go. `branched` holds those of runs whose states larger token budgets still
    begin with (`experiment/branches.py`). Nothing is changed.
    """
    wanted, found, notes = set(kinds), list[Removal](), list[str]()
    busy, kept, unknown = 0, 0, 0
    readers: dict[str, set[str]] = {}  # experiments with unfinished runs, by the tokens they read
    for directory in _runs(root):
        state = directory.state()
        if state == "running":
            busy += 1
            continue
        run = _config(directory)
        if run is None:  # another tool's folder, or a run of another version: not ours to judge
            if state != "done":
                readers.setdefault(_tokens(directory), set()).add(directory.path.parent.name)
            continue
        may_branch = run.optimizer.warmup_tokens and run.optimizer.schedule == "wsd"
        known = declared.get(directory.path.parent.name)
        other = known is not None and run.digest not in set(known)
        freed = state == "done" and "checkpoints" in wanted
        if freed and run.digest in branched:
            kept += 1
        elif freed and may_branch and (known is None or other):
            # overrides, such as another seed, may declare those that begin with them
            unknown += directory.checkpoints.exists()
        elif freed:
            found += _removal(
                "checkpoints", directory.checkpoints, "its run is finished", directory
            )
        elif state != "done" and "digests" in wanted and other:
            why = f"{state}, and no run of this digest is declared"
            found += _removal("digests", directory.path, why, directory)
        if state != "done" and not other:
            readers.setdefault(_tokens(directory), set()).add(directory.path.parent.name)
    if busy:
        stay = (
            "is being trained: it, and what it shares"
            if busy == 1
            else "are being trained: they, and what they share"
        )
        notes.append(f"{count(busy, 'run')} {stay}, stay")
    if kept:
        notes.append(
            f"checkpoints of {count(kept, 'finished run')} stay: larger token budgets begin with them"
        )
    if unknown:
        notes.append(
            f"checkpoints of {count(unknown, 'finished run')} stay: larger token budgets may begin with "
            "them; name their experiment to know, in quotes with the fields that declare them"
        )
    caches = cache_folder()
    here = [] if is_remote(root) else [root]  # a bucket holds neither
    if not busy and "compiled" in wanted:
        why = "of every experiment {}: made again when needed"
        found += _removal("compiled", caches / "compiled", why.format("on this machine"))
        for each in here:
            found += _removal("compiled", each / ".compiled", why.format("in this folder"))
    if not busy and "tokens" in wanted:
        for folder in (caches / "tokens", caches / "prepared"):
            inside = sorted(folder.iterdir()) if folder.is_dir() else []
            for each in inside:
                if names := readers.get(each.name):
                    notes.append(
                        f"{each} stays: unfinished runs of {', '.join(sorted(names))} read it"
                    )
                    continue
                why = f"no unfinished run below {root} reads it; copied again when others do"
                found += _removal("tokens", each, why)
    if "leftovers" in wanted:
        for folder in (caches, *here):
            found += _removal("leftovers", folder / ASIDE, "an earlier clean was ended")
    return found, notes


def remove(root: Path, what: Sequence[Removal]) -> Iterator[tuple[Removal, bool]]:
    """Remove each, and tell whether it is gone: not when somebody is at its run, or when that is finished,
    since it was looked at."""
    for each in what:
        path = as_path(each.path)
        if each.run is None:
            _remove(_put_aside(path, _base(root, path)))
            yield each, True
            continue
        directory = RunDirectory(as_path(each.run))
        with claim(directory.claim_file) as mine:
            done = mine and directory.result_file.exists() == (each.kind == "checkpoints")
            aside = _put_aside(path, _base(root, path)) if done else None
        _remove(aside)  # the claim may lie in it, and nobody needs one for it any more
        yield each, done
    for folder in {root, cache_folder()}:
        if not is_remote(folder):
            with contextlib.suppress(OSError):  # it is not there, or another clean is at work
                (folder / ASIDE).rmdir()


def removal_dict(
    what: Sequence[Removal], notes: Sequence[str], gone: Sequence[str]
) -> dict[str, Any]:
    """The plan of `removals` for programs, with the paths that were removed."""
    total = sum(each.bytes for each in what)
    return {
        "bytes": total,
        "can_go": [asdict(each) for each in what],
        "stays": list(notes),
        "removed": list(gone),
    }


# -------------------------------------------------------------------------------------- looking


def _listed(folder: Path) -> dict[str, tuple[int, float | None]]:
    """{path inside the folder: (bytes, when it was written)} of all files below it."""
    if is_remote(folder):
        return {name: (size, None) for name, size in sizes(folder).items()}
    out: dict[str, tuple[int, float | None]] = {}
    for name, size in sizes(folder).items():
        with contextlib.suppress(OSError):  # it was removed just now
            out[name] = size, modified(folder / name)
    return out


def _place_and_kind(name: str, runs: set[str]) -> tuple[str, str]:
    """Whose a file below the folder of the runs is, and what it is."""
    parts = name.split("/")
    if parts[0] in (".compiled", ASIDE):
        return parts[0], "compiled programs" if parts[0] == ".compiled" else "being removed"
    if len(parts) == 1:
        return "beside the experiments", "other files"
    if len(parts) > 2 and "/".join(parts[:2]) in runs:
        kinds = {"checkpoints": "checkpoints", "parameters": "trained models", "plugins": "traces"}
        averaged = parts[2].startswith("averaged-")
        what = "trained models" if averaged else kinds.get(parts[2], "") if len(parts) > 3 else ""
        return parts[0], what or "results and logs"
    return parts[0], "forecasts" if parts[1] == FORECASTS else "reports and other files"


def _elsewhere(root: Path, runs: set[str]) -> dict[tuple[str, str], None]:
    """Folders of this machine that the runs use and that lie elsewhere, with what is in them."""
    stores = dict[str, None]()
    for run in sorted(runs):
        with contextlib.suppress(UserError):  # `status` tells of what cannot be read
            stores[RunDirectory(root / run).config().data.store_path] = None
    caches = cache_folder()
    found = {(store, "tokens"): None for store in stores if not is_remote(store)}
    found |= {(str(caches / "compiled"), "compiled programs"): None}
    return found | {
        (str(caches / name), "copies of tokens"): None for name in ("tokens", "prepared")
    }


def _runs(root: Path) -> list[RunDirectory]:
    """Every run below the folder of the runs."""
    return [RunDirectory(file.parent) for file in sorted(root.glob("*/*/config.json"))]


def _config(directory: RunDirectory) -> RunConfig | None:
    """What a run was begun with; None where that cannot be read."""
    try:
        return directory.config()
    except UserError:
        return None


def _tokens(directory: RunDirectory) -> str:
    """The hash of the token store that a run was begun with; "" where that cannot be read."""
    try:
        return str(directory.data().get("store_hash", ""))
    except UserError:
        return ""


def _removal(
    kind: Kind, path: Path, why: str, directory: RunDirectory | None = None
) -> list[Removal]:
    """That, where there is anything."""
    found = sizes(path)
    if not found:
        return []
    run = None if directory is None else str(directory.path)
    return [Removal(kind, str(path), why, len(found), sum(found.values()), run)]


# ------------------------------------------------------------------------------------- removing


def _base(root: Path, path: Path) -> Path:
    """The folder, on the same disk if all is as usual, where a path is put aside."""
    caches = cache_folder()
    return caches if caches in path.parents else root


def _put_aside(path: Path, base: Path) -> Path | None:
    """Take a folder out of its place, at one stroke where it lies on a disk of this machine; where its
    files then are, unless they are removed."""
    if path.name == ASIDE:
        return path
    if not is_remote(path):
        # not its name: one as long as a folder's can be takes no more
        aside = base / ASIDE / os.urandom(8).hex()
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(path, aside)
            return aside
        except OSError as error:
            if error.errno != errno.EXDEV:  # a disk of its own is mounted there
                raise
    remove_folder(path)
    return None


def _remove(aside: Path | None) -> None:
    if aside is not None:
        with contextlib.suppress(FileNotFoundError):  # another clean is at it
            remove_folder(aside)
