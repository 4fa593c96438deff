"""An experiment: a Python module with `runs()`, found by name or path, changed by overrides."""

import contextlib
import fnmatch
import importlib
import importlib.util
import io
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from gqa_scaling.config import Question, RunConfig, UserError, nearest, require
from gqa_scaling.experiment.grid import looking_up_in, unique
from gqa_scaling.files.failures import failure


@dataclass(frozen=True)
class Experiment:
    """A named list of runs and the question they are to answer."""

    name: str
    runs: tuple[RunConfig, ...]
    question: Question
    about: str

    def select(self, only: str | None = None, shard: str | None = None) -> "Experiment":
        """The runs whose name matches the pattern `only`, and of those every n-th from i (i/n)."""
        runs = self.runs
        if only is not None:
            runs = tuple(r for r in runs if fnmatch.fnmatch(r.name, only) or only in r.name)
            names = ", ".join(r.name for r in self.runs[:4])
            require(
                bool(runs), f"--only {only!r} matches none of {len(self.runs)} runs ({names}, ...)"
            )
        if shard is not None:
            i, _, n = shard.partition("/")
            digits = i.isdecimal() and n.isdecimal() and max(len(i), len(n)) < 10
            valid = digits and 0 <= int(i) < int(n)
            require(valid, f"--shard {shard!r} must be i/n with 0 <= i < n, such as 0/4")
            runs = runs[int(i) :: int(n)]
        return replace(self, runs=runs)


def load_experiment(
    spec: str, overrides: Sequence[str] = (), root: Path | None = None
) -> Experiment:
    """The experiment named by a module (experiments.smoke) or a file path (experiments/smoke.py).

    The working directory is on the path. `overrides` are pairs such as --model.n-layers 4 and
    change every run. Learning rates that the experiment looks up are those of runs below `root` (by
    default as `runs_root` says). Raises UserError for an unknown experiment, field or value.
    """
    with _own_errors(spec), looking_up_in(root):
        module = _import(spec)
    own = callable(getattr(module, "runs", None))
    require(own, f"{spec} is no experiment: it defines no runs(){_shadowed(spec, module)}")
    changes = parse_overrides(overrides)
    with _own_errors(spec), looking_up_in(root):
        declared = module.runs()
    must = f"{spec}: runs() must return a list of RunConfig, not empty"
    require(isinstance(declared, list), f"{must}: it returned {_kind(declared)}")
    require(bool(declared), must)
    other = next((run for run in declared if not isinstance(run, RunConfig)), None)
    require(all(isinstance(run, RunConfig) for run in declared), f"{must}: one is {_kind(other)}")
    changed = [apply_overrides(run, changes) for run in declared]
    # overrides may leave one run of a grid, as those of `overrides_to` do
    runs = unique(dict.fromkeys(changed) if changes else changed)
    question = getattr(module, "QUESTION", Question())
    is_one = isinstance(question, Question)
    require(is_one, f"{spec}: QUESTION must be a Question, not {_kind(question)}")
    about = (module.__doc__ or "").strip().split("\n")[0]
    name = module.__name__.rpartition(".")[2]
    require(bool(name), f"{spec} names no folder for its runs: rename the file")
    return Experiment(name, tuple(runs), question, about)


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
        require(
            path.is_file(), f"unknown experiment {spec!r}: no such file{_experiments_hint(spec)}"
        )
        loaded = importlib.util.spec_from_file_location(f"experiment_file.{path.stem}", path)
        assert loaded is not None
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
    known = [f"experiments.{p.stem}" for p in sorted(Path("experiments").glob("*.py"))]
    if not known:
        return "; there is no folder experiments/ here"
    name = spec.removesuffix(".py").replace("/", ".")
    if f"experiments.{name}" in known:
        return f" (did you mean experiments.{name}?)"
    return nearest(name, known) or f"; known: {', '.join(known)}"


# ------------------------------------------------------------------------------- overrides


def _field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    hints, out = typing.get_type_hints(cls), {}
    for f in fields(cls):
        hint = hints[f.name]
        inner = next((h for h in (hint, *typing.get_args(hint)) if is_dataclass(h)), None)
        if inner is not None:
            out |= _field_types(inner, f"{prefix}{f.name}.")
        if inner is not hint:  # a table that may be left out is cleared by "none"
            out[prefix + f.name] = Literal["none"] if inner else hint
    return out


def _value_of(run: RunConfig, name: str) -> Any:
    """The value of a dotted field; None inside a table that is None, as a dense model's pattern."""
    value: Any = run
    for part in name.split(".") if name else ():
        value = None if value is None else getattr(value, part)
    return value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """{"model.n_layers": 4} from ["--model.n-layers", "4"]; values are read by tyro.

    A table that may be left out is cleared by "none": --model.pattern none.
    """
    known, out = _field_types(RunConfig), {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        require(
            flag.startswith("--"), f"unexpected argument {flag!r}: overrides look like --seed 1"
        )
        flag, equals, value = flag.partition("=")
        name = flag[2:].replace("-", "_")
        require(name in known, f"unknown field {flag}{_flag_hint(name, known)}")
        if not equals:
            require(bool(rest), f"{flag} needs a value")
            value = rest.pop(0)
        out[name] = _parse_value(flag, known[name], value)
    return out


def _flag_hint(name: str, known: dict[str, Any]) -> str:
    by_leaf = {k.rpartition(".")[2]: k for k in known}
    found = nearest(name, known) or nearest(name.rpartition(".")[2], by_leaf)
    if not found:
        return "; see --help for the fields"
    guess = found.removeprefix(" (did you mean ").removesuffix("?)")
    return f" (did you mean --{by_leaf.get(guess, guess).replace('_', '-')}?)"


def _parse_value(flag: str, hint: Any, value: str) -> Any:
    import tyro

    if value.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    if str in (hint, *typing.get_args(hint)):
        return value  # also one that begins with a dash
    value = value.lower() if hint == Literal["none"] else value
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(hint, args=[value])
    except SystemExit:
        if typing.get_origin(hint) is typing.Literal:
            choices = ", ".join(typing.get_args(hint))
            raise UserError(f"{flag}={value!r} must be one of {choices}") from None
        name = getattr(hint, "__name__", str(hint))
        raise UserError(f"{flag}={value!r} must be of type {name}") from None


def overrides_to(runs: Sequence[RunConfig], target: RunConfig) -> list[str]:
    """The arguments that turn every one of these runs into `target`, for `parse_overrides`."""
    out = []
    for name in _field_types(RunConfig):
        value, table = _value_of(target, name), _value_of(target, name.rpartition(".")[0])
        if all(_value_of(run, name) == value for run in runs):
            continue
        if is_dataclass(value) or table is None:
            continue  # said field by field; cleared as a whole
        if value is None and name in ("tokens", "tokens_per_param"):
            continue  # the other budget is set
        text = "none" if name == "model.pattern" else str(value)
        out += [f"--{name.replace('_', '-')}", text]
    return out


def apply_overrides(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The run with fields replaced; setting one token budget clears the other."""
    data = run.to_dict()
    if "tokens" in changes and "tokens_per_param" not in changes:
        data["tokens_per_param"] = None
    if "tokens_per_param" in changes and "tokens" not in changes:
        data["tokens"] = None
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        table = data
        for parent in parents:
            if table[parent] is None:
                needed = {"model.pattern.block", "model.pattern.local"}
                require(
                    needed <= changes.keys(),
                    f"{run.name} is dense: a pattern needs --model.pattern.block and "
                    "--model.pattern.local",
                )
                table[parent] = {}
            table = table[parent]
        table[leaf] = None if name == "model.pattern" else value
    return RunConfig.from_dict(data) if changes else run
