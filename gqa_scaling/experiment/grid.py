"""Grids of runs: sizes x heads x contexts x seeds, as plain lists of `RunConfig`."""

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from gqa_scaling.config import ModelConfig, RunConfig, UserError, require
from gqa_scaling.costs import n_exact, n_formula
from gqa_scaling.files.runs import RunDirectory, run_directory, runs_root


def head_candidates(max_heads: int) -> list[tuple[int, int]]:
    """(n_h, n_kv) over powers of two up to `max_heads`, n_kv <= n_h: 21 of them for 32.

    Step 1 of the search of Chen et al. 2025, section 4.1.
    """
    require(
        max_heads > 0 and max_heads & (max_heads - 1) == 0,
        f"max_heads={max_heads} must be a power of two",
    )
    powers = [2**k for k in range(max_heads.bit_length())]
    return [(h, kv) for h, kv in itertools.product(powers, powers) if kv <= h]


def unique(runs: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs as a list, refused when two share a name or would train the same model."""
    runs = list(runs)
    for key, what in ((lambda r: r.name, "name"), (lambda r: r.digest, "definition")):
        seen: dict[str, RunConfig] = {}
        for run in runs:
            other = seen.setdefault(key(run), run)
            require(other is run, f"runs {other.name} and {run.name} share one {what}")
    return runs


# ------------------------------------------------------------------- one more model of a grid


def run_of(runs: Sequence[RunConfig], model: ModelConfig, tokens: int | None = None) -> RunConfig:
    """The run that trains `model` as the grid's runs were trained.

    Data, batch, context length, evaluation and learning rate are those of the run nearest in size,
    counted at the model's heads; of several, those with its heads, its pattern and the least seed
    come first.
    Without `tokens`, one budget for all stays as it is and budgets that grow with the model keep
    their tokens per parameter. The name says what it is, the note whose learning rate it has.
    """

    def size(m: ModelConfig) -> float:
        heads = model.n_heads, model.n_kv_heads, model.head_dim
        return math.log(n_formula(m.n_layers, m.d_model, *heads))

    def distance(run: RunConfig) -> tuple[float, bool, bool, int]:
        m = run.model
        other = (m.n_heads, m.n_kv_heads) != (model.n_heads, model.n_kv_heads)
        return abs(size(m) - size(model)), other, m.pattern != model.pattern, run.seed

    near = min(runs, key=distance)
    ratio = None if tokens else near.tokens_per_param
    if not tokens and near.tokens is not None:
        if len({run.tokens for run in runs}) == 1:
            tokens = near.tokens
        else:
            ratio = near.tokens / n_exact(near.model)
    name = f"built-L{model.n_layers}-d{model.d_model}-h{model.n_heads}-kv{model.n_kv_heads}"
    if model.pattern:
        name += "-" + re.sub(r"[^a-zA-Z0-9]+", "-", model.pattern.label)
    return replace(
        near,
        name=name,
        model=model,
        tokens=tokens,
        tokens_per_param=ratio,
        note=f"learning rate {near.optimizer.learning_rate:g} of {near.name}",
    )


def beside(root: Path, experiment: str, runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs in the experiment's folder that are none of these but were trained as they were.

    They are what `run_of` gives for their model: a study's predictions can be checked by them.
    """
    own, out = {run.digest for run in runs}, []
    for file in sorted((root / experiment).glob("*/config.json")):
        with contextlib.suppress(UserError):  # what another version declared is none of ours
            run = RunDirectory(file.parent).config()
            alike = [r for r in runs if r.context_length == run.context_length]
            if run.digest in own or not alike:
                continue
            swept = len({(r.model, r.seed) for r in alike}) < len(alike)  # over token budgets
            made = run_of(alike, run.model, run.tokens if swept else None)
            if made.digest == run.digest:
                out.append(replace(made, name=run.name))
    return out


# ------------------------------------------------------------------- learning rate by size


@dataclass(frozen=True)
class LearningRateChoice:
    """The best maximum learning rate for one size, of those tried with one loss each."""

    learning_rate: float
    tried: tuple[tuple[float, float], ...]  # (learning rate, loss in nats), ascending

    @property
    def edge(self) -> str:
        """'lowest' or 'highest' when the best rate is the last one tried on that side, else ''.

        The best rate may then lie outside the sweep.
        """
        rates = [rate for rate, _ in self.tried]
        if self.learning_rate == rates[0]:
            return "lowest"
        return "highest" if self.learning_rate == rates[-1] else ""


# Where an experiment that is being declared finds the runs of others; None: as `runs_root` says.
_lookup_root: ContextVar[Path | None] = ContextVar("lookup root", default=None)


@contextlib.contextmanager
def looking_up_in(root: Path | None) -> Iterator[None]:
    """Have `learning_rate_choices`, where the body calls it without a root, read runs below this one.

    An experiment's own `runs()` calls it so: it cannot know what --root a command was given.
    """
    token = _lookup_root.set(root)
    try:
        yield
    finally:
        _lookup_root.reset(token)


def learning_rate_choices(
    experiment: str, runs: Iterable[RunConfig], root: Path | None = None
) -> dict[tuple[int, int], LearningRateChoice]:
    """For each (n_layers, d_model) of a learning-rate sweep, the rate of least loss.

    Chen et al. 2025, appendix: swept once per size with MHA and kept for every head
    configuration. `runs` are those of the sweep; a size of which one is unfinished, or not judged
    by its evaluation, is left out, so that a grid never changes while its sweep goes on. The runs
    are below `root`, by default that of the command which loads the experiment.
    """
    root = root or _lookup_root.get() or runs_root()
    tried: dict[tuple[int, int], dict[float, float]] = {}
    unfinished = set()
    for run in runs:
        size = (run.model.n_layers, run.model.d_model)
        whole = run_directory(root, experiment, run).result()
        value = whole and whole["result"]["evaluations"].get(run.evaluation_digest)
        if value:
            tried.setdefault(size, {})[run.optimizer.learning_rate] = value["loss"]
        else:
            unfinished.add(size)
    return {
        size: LearningRateChoice(min(losses, key=losses.__getitem__), tuple(sorted(losses.items())))
        for size, losses in sorted(tried.items())
        if size not in unfinished
    }


def with_learning_rate(
    run: RunConfig, choices: Mapping[tuple[int, int], LearningRateChoice], sweep: str
) -> RunConfig:
    """The run at its size's swept learning rate; its note says where the rate comes from.

    A size the sweep `sweep` has not finished keeps the rate it was declared with, and says so.
    """
    choice = choices.get((run.model.n_layers, run.model.d_model))
    rate = run.optimizer.learning_rate if choice is None else choice.learning_rate
    if choice is None:
        size = f"L{run.model.n_layers} d{run.model.d_model}"
        note = f"learning rate {rate:g} as declared; {sweep} has not finished {size}"
    else:
        edge = f", AT THE {choice.edge.upper()} RATE TRIED" if choice.edge else ""
        note = f"learning rate {rate:g} from {sweep} ({len(choice.tried)} tried{edge})"
    return replace(run, optimizer=replace(run.optimizer, learning_rate=rate), note=note)
