"""Runs that start from the trained parameters of another: which one, and what may differ.

Published for long contexts (Chen et al. 2025): training at 4K tokens goes on at 128K with a fresh
optimizer and a lower learning rate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gqa_scaling.config import DIGEST_LENGTH, RunConfig, UserError, require
from gqa_scaling.files.runs import RunDirectory, parent_directory, run_directory, runs_root

# What of a model may differ from the one whose parameters it begins with: no shape follows from it.
MAY_DIFFER = ("rope_theta", "pattern", "dtype")


def start_of(parent: RunConfig, experiment: str) -> str:
    """What `start_from` says of a run of an experiment."""
    return f"{experiment}/{parent.name}-{parent.digest}"


def parent_of(run: RunConfig, runs: Iterable[RunConfig]) -> RunConfig | None:
    """The one of these runs that `run` starts from, None where it is another or there is none."""
    if run.start_from is None:
        return None
    digest = run.start_from[-DIGEST_LENGTH:]
    return next((other for other in runs if other.digest == digest), None)


def relinked(declared: Sequence[RunConfig], changed: Sequence[RunConfig]) -> list[RunConfig]:
    """The changed runs, each starting from what became of the run that it was declared to start from.

    `changed` are the runs `declared` in the same order, with other fields and so other digests.
    """
    now = dict(zip((run.digest for run in declared), changed, strict=True))
    done: dict[str, RunConfig] = {}

    def relink(old: RunConfig) -> RunConfig:
        if old.digest not in done:
            new, parent = now[old.digest], parent_of(old, declared)
            if parent is not None and new.start_from == old.start_from:
                experiment = str(old.start_from).partition("/")[0]
                new = replace(new, start_from=start_of(relink(parent), experiment))
            done[old.digest] = new
        return done[old.digest]

    return [relink(run) for run in declared]


def parents_first(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs in their order, but none before the one that it starts from."""
    out: dict[str, RunConfig] = {}

    def add(run: RunConfig) -> None:
        parent = parent_of(run, runs)
        if parent is not None:
            add(parent)
        out.setdefault(run.digest, run)

    for run in runs:
        add(run)
    return list(out.values())


def with_digest(start: str, experiment: str, runs: Iterable[RunConfig], root: Path | None) -> str:
    """`start_from` as a config has it, for EXPERIMENT/NAME too: the run of that name among those of
    `experiment`, else the only one below `root`. Raises UserError where there is none, or several."""
    place, _, name = start.partition("/")
    own = [run for run in runs if place == experiment and run.name == name]
    if own:
        return start_of(own[0], experiment)
    folder = (root or runs_root()) / place
    end = "[0-9a-f]" * DIGEST_LENGTH
    found = sorted(path.name for path in folder.glob(f"{name}-{end}")) if name else []
    if len(found) > 1:
        raise UserError(
            f"--start-from {start} may be {' or '.join(found)} in {folder}: name it with its digest"
        )
    return f"{place}/{found[0]}" if found else start


# ------------------------------------------------------------------------- what may differ


def check_start(run: RunConfig, parent: RunConfig) -> None:
    """Refuse a parent whose parameters do not fit the run's model, or whose tokens mean others."""
    a, b = parent.model.to_dict(), run.model.to_dict()
    fixed = [name for name in a if name not in MAY_DIFFER]
    different = [f"model.{name}: {a[name]} -> {b[name]}" for name in fixed if a[name] != b[name]]
    require(
        not different,
        f"{run.name} cannot start from {parent.name}, which has another architecture "
        f"({', '.join(different)}): only {', '.join(MAY_DIFFER)} may differ",
    )
    one, other = (_tokenizer(r) for r in (parent, run))
    require(
        one == other,
        f"{run.name} cannot start from {parent.name}, which reads other tokens ({one} -> {other})",
    )


def _tokenizer(run: RunConfig) -> str:
    """What its tokens mean; a BPE is trained on its corpus."""
    declared = run.data.declaration()
    trained = declared["tokenizer"].startswith("bpe-") and not run.data.tokenizer.endswith(".json")
    return f"{declared['tokenizer']} of {declared['corpus']}" if trained else declared["tokenizer"]


def check_starts(runs: Sequence[RunConfig], experiment: str, root: Path) -> None:
    """`check_start` for every run that starts from another: one of `runs`, or one below `root`."""
    for run in runs:
        parent = parent_of(run, runs)
        directory = run.start_from and parent_directory(run_directory(root, experiment, run), run)
        if parent is None and directory and directory.config_file.exists():
            parent = directory.config()
        if parent is not None:
            check_start(run, parent)


def require_parent(run: RunConfig, directory: RunDirectory, tokenizer_hash: str) -> None:
    """Refuse a run whose parent, in `directory`, is not trained and not being trained, or was
    trained with another tokenizer."""
    state = directory.state()
    require(
        state in ("done", "running"),
        f"{run.name} starts from {run.start_from}, and {directory.path} is not finished ({state}): "
        "train that run first",
    )
    require(
        not directory.is_restored(),
        f"{run.name} starts from {run.start_from}, and {directory.path} was put back from a kept study, without "
        "its parameters: remove it and train that run again first",
    )
    known = directory.data().get("tokenizer_hash")
    require(
        known == tokenizer_hash,
        f"{run.name} starts from {run.start_from}, which was trained with another tokenizer "
        f"({str(known)[:12]} -> {tokenizer_hash[:12]}): prepare the same one",
    )
