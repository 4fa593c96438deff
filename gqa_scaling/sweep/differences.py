"""Two runs, or two grids of them, side by side: what was asked for otherwise, and what came of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, defining_fields
from gqa_scaling.experiment.load import named_runs
from gqa_scaling.files.runs import RunDirectory, evaluation_in, run_directory, runs_in, runs_root
from gqa_scaling.files.storage import as_path, is_remote
from gqa_scaling.sweep.details import differences, fields_of

FOR_PEOPLE = ("name", "note")  # fields that say nothing of what a run does


@dataclass(frozen=True)
class Side:
    """The runs that one of the two names, with their directories."""

    name: str
    runs: tuple[tuple[RunConfig, RunDirectory], ...]


@dataclass(frozen=True)
class Changed:
    """A field and the values that it has on either side, each once, in the order of the runs.

    `defines`: another value makes another trained model.
    """

    field: str
    values: tuple[tuple[Any, ...], tuple[Any, ...]]
    defines: bool


@dataclass(frozen=True)
class Pair:
    """Two runs that stand for each other, with the fields in which they differ.

    `losses` are held-out, in nats, each under its run's own evaluation and None where that is not
    finished; `comparable` says whether both were measured on the same targets.
    """

    names: tuple[str, str]
    digests: tuple[str, str]
    n_exact: tuple[int, int]
    losses: tuple[float | None, float | None]
    comparable: bool
    differs: dict[str, tuple[Any, Any]]

    @property
    def difference(self) -> float | None:
        """Loss of the second minus that of the first, in nats; None where the two cannot be compared."""
        first, second = self.losses
        if first is None or second is None or not self.comparable:
            return None
        return second - first


@dataclass(frozen=True)
class Difference:
    """What differs between two sides: fields, runs that only one has, and results of those that both have."""

    sides: tuple[str, str]
    fields: tuple[Changed, ...]
    pairs: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        pairs = [asdict(pair) | {"difference": pair.difference} for pair in self.pairs]
        return asdict(self) | {"pairs": pairs}


def read_side(text: str, root: str | None) -> Side:
    """The run or the runs that `text` names: a run directory, a folder of them, or EXPERIMENT[:RUN,...]
    with fields after it. `root` is that of the runs of experiments, as in `runs_root`.

    Raises UserError where it names none.
    """
    path = as_path(text)
    if is_remote(path) or path.is_dir():
        return Side(text, tuple((each.config(), each) for each in runs_in(path)))
    folder = runs_root(root)
    experiment, _ = named_runs(text, folder)
    runs = experiment.runs
    return Side(text, tuple((run, run_directory(folder, experiment.name, run)) for run in runs))


def compare_sides(a: Side, b: Side) -> Difference:
    """What differs. Two single runs stand for each other; of grids those that train the same model, and
    of the others those of one name."""
    matched = _matched(a, b)
    pairs = tuple(_pair(one, other) for one, other in matched)
    left = [run.name for run, _ in a.runs if run not in [one[0] for one, _ in matched]]
    right = [run.name for run, _ in b.runs if run not in [other[0] for _, other in matched]]
    return Difference(
        (a.name, b.name), tuple(_changed(a, b, pairs)), pairs, (tuple(left), tuple(right))
    )


Found = tuple[RunConfig, RunDirectory]


def _matched(a: Side, b: Side) -> list[tuple[Found, Found]]:
    if len(a.runs) == len(b.runs) == 1:
        return [(a.runs[0], b.runs[0])]
    by_digest = {found[0].digest: found for found in b.runs}
    same = {one[0].digest for one in a.runs} & by_digest.keys()
    by_name = {found[0].name: found for found in b.runs if found[0].digest not in same}
    out = []
    for one in a.runs:
        if one[0].digest in same:
            out.append((one, by_digest[one[0].digest]))
        elif one[0].name in by_name:
            out.append((one, by_name[one[0].name]))
    return out


def _pair(one: Found, other: Found) -> Pair:
    (a, a_directory), (b, b_directory) = one, other
    first = evaluation_in(a_directory.result(), a.evaluation_digest) or {}
    second = evaluation_in(b_directory.result(), b.evaluation_digest) or {}
    return Pair(
        names=(a.name, b.name),
        digests=(a.digest, b.digest),
        n_exact=(costs.n_exact(a.model), costs.n_exact(b.model)),
        losses=(first.get("loss"), second.get("loss")),
        comparable=bool(first and second) and first.get("hash") == second.get("hash"),
        differs={k: v for k, v in differences(a, b).items() if k != "name"},
    )


def _changed(a: Side, b: Side, pairs: Sequence[Pair]) -> list[Changed]:
    """The fields that differ in any pair, or whose values are not the same on both sides."""
    mine, other = _values(a), _values(b)
    defining = {name for side in (a, b) for run, _ in side.runs for name in defining_fields(run)}
    in_pairs = {name for pair in pairs for name in pair.differs}
    out = []
    for name in dict.fromkeys([*mine, *other]):
        values = mine.get(name, ()), other.get(name, ())
        grid = len(a.runs) > 1 or len(b.runs) > 1
        if name == "name" or (grid and name in FOR_PEOPLE):
            continue
        if name in in_pairs or set(map(repr, values[0])) != set(map(repr, values[1])):
            out.append(Changed(name, values, name in defining))
    return out


def _values(side: Side) -> dict[str, tuple[Any, ...]]:
    """Each field's values over the runs of a side, each once."""
    out: dict[str, dict[str, Any]] = {}
    for run, _ in side.runs:
        for field in fields_of(run):
            out.setdefault(field.name, {}).setdefault(repr(field.value), field.value)
    return {name: tuple(values.values()) for name, values in out.items()}
