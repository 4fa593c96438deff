"""An experiment: a Python module with `runs()`, found by its name or its path.

It may also hold `QUESTION`, what a study asks of the runs, and `LEARNING_RATES`, the sweep whose
best rates they are trained at. Where it names `VARIANTS`, such as ("laptop", "smoke"),
experiments.NAME@laptop is what `runs("laptop")` and, if it is there, `question("laptop")` give.
"""

import contextlib
import fnmatch
import importlib
import importlib.util
import itertools
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from gqa_scaling.config import Question, RunConfig, UserError, require
from gqa_scaling.experiment.branches import Trunk, smallest_budget_first, trunks
from gqa_scaling.experiment.grid import unique
from gqa_scaling.experiment.learning_rates import LearningRateSweep, at_swept_rates
from gqa_scaling.experiment.overrides import apply_overrides, parse_overrides
from gqa_scaling.experiment.starts import parents_first, relinked, with_digest
from gqa_scaling.fields import did_you_mean
from gqa_scaling.files.failures import failure
from gqa_scaling.files.runs import RunDirectory, run_directory, runs_root
from gqa_scaling.files.storage import as_path, is_remote
from gqa_scaling.units import count


@dataclass(frozen=True)
class Experiment:
    """A named list of runs and the question they are to answer.

    `runs` are those that are asked for, some of the `declared` ones or all.
    """

    name: str
    runs: tuple[RunConfig, ...]
    question: Question
    declared: tuple[RunConfig, ...] = ()

    @property
    def trunks(self) -> dict[str, Trunk]:
        """What runs share until their decay, by their digests; those that were not selected count."""
        return trunks(self.declared or self.runs)

    def select(self, only: str | None = None, shard: str | None = None) -> "Experiment":
        """The runs whose name matches a pattern of `only`, and of those every n-th from i (i/n), where
        runs that share steps count as one.

        Several patterns are separated by commas, which no name holds; each must match some run.
        """
        runs = self.runs
        if only is not None:
            patterns, names = only.split(","), ", ".join(r.name for r in self.runs[:4])
            found = [
                {r.name for r in runs if fnmatch.fnmatch(r.name, p) or p in r.name}
                for p in patterns
            ]
            for pattern, some in zip(patterns, found, strict=True):
                require(bool(pattern), f"--only {only!r} has an empty pattern, which is any name")
                require(
                    bool(some),
                    f"--only {pattern!r} matches none of {count(len(runs), 'run')} ({names}, ...)",
                )
            runs = tuple(r for r in runs if any(r.name in some for some in found))
        if shard is not None:
            i, _, n = shard.partition("/")
            digits = i.isdecimal() and n.isdecimal() and max(len(i), len(n)) < 10
            valid = digits and 0 <= int(i) < int(n)
            require(valid, f"--shard {shard!r} must be i/n with 0 <= i < n, such as 0/4")
            shared, together = self.trunks, dict[str, list[RunConfig]]()
            for run in runs:
                first = shared[run.digest].runs[0] if run.digest in shared else run
                together.setdefault(first.digest, []).append(run)
            shares = list(together.values())[int(i) :: int(n)]
            runs = tuple(itertools.chain.from_iterable(shares))
        return replace(self, runs=runs, declared=self.declared or self.runs)


def load_experiment(
    spec: str, overrides: Sequence[str] = (), root: Path | None = None
) -> Experiment:
    """The experiment named by a module (experiments.smoke) or a file path (experiments/smoke.py), and
    after an @ by one of its variants, whose runs lie in a folder of their own, NAME_VARIANT.

    The working directory is on the path. `overrides` are pairs such as --model.n-layers 4 and
    change every run. The sweep that learning rates are taken from lies below `root`, without it below
    `runs_root()`. Raises UserError for an unknown experiment, field or value.
    """
    place, variant = split_variant(spec)
    with _own_errors(spec):
        module = _import(place)
    own = callable(getattr(module, "runs", None))
    require(own, f"{spec} is no experiment: it defines no runs(){_shadowed(spec, module)}")
    changes = parse_overrides(overrides)
    name = folder_of(place)
    require(not name.startswith("."), f"{spec} names no folder for its runs: rename the file")
    if variant:
        _require_variant(place, module, variant)
        name = f"{name}_{variant}"
    chosen = (variant,) if variant else ()
    declared = _declared_runs(spec, module, *chosen)
    swept = declared if variant else _at_swept_rates(spec, module, declared, root)
    if changes.get("start_from"):
        changes["start_from"] = with_digest(changes["start_from"], name, swept, root)
    # a rate of one's own is not the sweep's, and no note may say so
    before = declared if "optimizer.learning_rate" in changes else swept
    changed = relinked(declared, [apply_overrides(run, changes) for run in before])
    # overrides may leave one run of a grid, as those of `overrides_to` do
    runs = unique(dict.fromkeys(changed) if changes else changed)
    runs = parents_first(smallest_budget_first(runs))
    question = getattr(module, "QUESTION", Question())
    if variant and hasattr(module, "question"):
        with _own_errors(spec):
            question = module.question(variant)
    is_one = isinstance(question, Question)
    require(is_one, f"{spec}: QUESTION must be a Question, not {_kind(question)}")
    return Experiment(name, tuple(runs), question, tuple(runs))


def split_variant(spec: str) -> tuple[str, str]:
    """The module or file, and the variant after its @; "" where there is none."""
    place, _, variant = spec.rpartition("@")
    # the name of a folder may hold an @ as well
    return (place, variant) if place and variant.isidentifier() else (spec, "")


def folder_of(spec: str) -> str:
    """The folder below the root that holds the runs of an experiment, by its name alone."""
    place, variant = split_variant(spec)
    name = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    return f"{name}_{variant}" if variant else name


def named_runs(text: str, root: Path | None = None) -> tuple[Experiment, bool]:
    """The runs that EXPERIMENT[:RUN,...] and fields after it name, and whether it names single ones.

    Such as "experiments.smoke:L4-d96-h4-kv4 --seed 1". Raises UserError as `load_experiment`, and for
    a run that the experiment does not declare.
    """
    first, *overrides = words_of(text)
    spec, colon, names = first.partition(":")
    experiment = load_experiment(spec, overrides, root)
    if not colon:
        return experiment, False
    known, wanted = {run.name: run for run in experiment.runs}, dict.fromkeys(names.split(","))
    for name in wanted:
        require(name in known, f"{spec} declares no run {name!r}{did_you_mean(name, known)}")
    runs = tuple(known[name] for name in wanted)
    return replace(experiment, runs=runs, declared=experiment.runs), True


def named_run(source: str, rest: Sequence[str], root: str | None) -> RunDirectory:
    """The directory of the run that `source` names as in `find_run`; it must have been started."""
    run, directory = find_run(source, rest, root)
    spec = source.rpartition(":")[0]
    return _begun(run, directory, f"`gqa-scaling run {spec} --only {run.name}`")


def find_run(source: str, rest: Sequence[str], root: str | None) -> tuple[RunConfig, RunDirectory]:
    """The run that `source` names: its directory, here or in a bucket, or EXPERIMENT:NAME, begun or not.

    `rest` are overrides of an experiment's fields. Raises `UserError` where it names no run.
    """
    path = as_path(source)
    if is_remote(path) or path.is_dir():
        require(not rest, f"{path} is a directory: {' '.join(rest[:1])} changes runs of a grid")
        if (path / "config.json").exists():
            found = RunDirectory(path)
            return found.config(), found
        inside = sorted(file.parent.name for file in path.glob("*/config.json"))
        some = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        hint = f"it holds {len(inside)}: name one of {some}" if inside else "it has no config.json"
        raise UserError(f"{path} is no run: {hint}")
    spec, colon, name = source.rpartition(":")
    require(
        bool(spec and colon and name),
        f"{source!r} names no run: give its directory, or EXPERIMENT:NAME, such as "
        "experiments.smoke:L2-d24-h4-kv4",
    )
    folder = runs_root(root)
    experiment = load_experiment(spec, rest, folder)
    run = _named(experiment, name, spec)
    return run, run_directory(folder, experiment.name, run)


def run_of(experiment: Experiment, name: str, root: Path, called: str, remedy: str) -> RunDirectory:
    """The run of that name, below `root`, the folder of all runs. Raises UserError where the experiment,
    which is `called` so, has none, or where it has not been started, which `remedy` does."""
    run = _named(experiment, name, called)
    return _begun(run, run_directory(root, experiment.name, run), remedy)


def _named(experiment: Experiment, name: str, called: str) -> RunConfig:
    known = {run.name: run for run in experiment.runs}
    hint = did_you_mean(name, known) or f"; it has {', '.join(list(known)[:3])}, ..."
    require(name in known, f"{called} has no run named {name!r}{hint}")
    return known[name]


def _begun(run: RunConfig, directory: RunDirectory, remedy: str) -> RunDirectory:
    require(
        directory.config_file.exists(),
        f"{run.name} has not been started: there is no {directory.path}; train it with {remedy}",
    )
    return directory


def words_of(text: str) -> list[str]:
    """An experiment and the fields after it, as a shell takes them apart; UserError for no words."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r} names no experiment: {error}") from None
    require(bool(words), f"{text!r} names no experiment")
    return words


def _require_variant(place: str, module: ModuleType, variant: str) -> None:
    known = getattr(module, "VARIANTS", ())
    require(bool(known), f"{place} has no variants: leave out @{variant}")
    others = did_you_mean(variant, known) or f"; known: {', '.join(known)}"
    require(variant in known, f"{place} has no variant {variant!r}{others}")


def _declared_runs(spec: str, module: ModuleType, *variant: str) -> list[RunConfig]:
    """What the module's runs() returns."""
    with _own_errors(spec):
        runs = module.runs(*variant)
    must = f"{spec}: runs() must return a list of RunConfig, not empty"
    require(isinstance(runs, list), f"{must}: it returned {_kind(runs)}")
    require(bool(runs), must)
    for run in runs:
        require(isinstance(run, RunConfig), f"{must}: one is {_kind(run)}")
    return unique(runs)


def _at_swept_rates(
    spec: str, module: ModuleType, runs: list[RunConfig], root: Path | None
) -> list[RunConfig]:
    """The runs, each at its size's swept learning rate if the module names a sweep."""
    sweep = getattr(module, "LEARNING_RATES", None)
    if sweep is None:
        return runs
    is_one = isinstance(sweep, LearningRateSweep)
    require(is_one, f"{spec}: LEARNING_RATES must be a LearningRateSweep, not {_kind(sweep)}")
    with _own_errors(spec):
        return at_swept_rates(runs, sweep, root)


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


@contextlib.contextmanager
def _own_errors(spec: str) -> Iterator[None]:
    """What an experiment's own code raises, as a UserError that names the line; what it prints goes to
    stderr, as stdout may be read by a program."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if failure(error) is not None:  # a bucket that it reads is away
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _is_own(Path(frame.filename))]
        where = f" ({own[-1].filename} line {own[-1].lineno})" if own else ""
        if isinstance(error, SystemExit):
            ended = f"{spec} ends the program (exit code {error.code}){where}: an experiment only"
            raise UserError(f"{ended} declares its runs") from error
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"{spec} cannot be loaded: {said}{where}") from error


def _is_own(file: Path) -> bool:
    """Whether code is the user's: below the working directory, installed nowhere, none of ours."""
    installed = "site-packages" in file.parts or Path(__file__).parent in file.parents
    return Path.cwd() in file.absolute().parents and not installed and file.suffix == ".py"


def _shadowed(spec: str, module: ModuleType) -> str:
    """A hint where Python's own module of that name was taken for the user's file."""
    file = Path(*spec.split(".")).with_suffix(".py")
    theirs = getattr(module, "__file__", None)
    same = theirs is not None and Path(theirs).resolve() == file.resolve()
    return f"; for the file here, name it {file}" if file.is_file() and not same else ""


def _import(spec: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if spec.endswith(".py"):
        path = Path(spec)
        hint = _experiments_hint(spec)
        require(path.is_file(), f"unknown experiment {spec!r}: no such file{hint}")
        loaded = importlib.util.spec_from_file_location(f"experiment_file.{path.stem}", path)
        assert loaded is not None  # as its name ends in .py
        assert loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        sys.modules[loaded.name] = module  # dataclasses look their module up there
        loaded.loader.exec_module(module)
        return module
    known = all(part.isidentifier() for part in spec.split("."))
    require(known, f"unknown experiment {spec!r}{_experiments_hint(spec)}")
    try:
        return importlib.import_module(spec)
    except ModuleNotFoundError as error:
        parts = spec.split(".")
        parents = {".".join(parts[: k + 1]) for k in range(len(parts))}
        if error.name not in parents:
            raise  # the experiment itself imports something that is missing: `_own_errors` says what
        raise UserError(f"unknown experiment {spec!r}{_experiments_hint(spec)}") from None


def _experiments_hint(spec: str) -> str:
    """What to try instead of an unknown experiment."""
    known = [f"experiments.{p.stem}" for p in sorted(Path("experiments").glob("*.py"))]
    if not known:
        return f"; there is no folder experiments/ in {Path.cwd()}, where this command was given"
    name = spec.removesuffix(".py").replace("/", ".")
    if f"experiments.{name}" in known:
        return f" (did you mean experiments.{name}?)"
    return did_you_mean(name, known) or f"; known: {', '.join(known)}"
