"""Runs that a study could do next: the rest of its grid, and what lies beyond it.

Beyond a finished grid, or others' runs that come without one, lie larger sizes, sizes that only
some configurations have, more seeds, heads and training context lengths that nobody trained. What is
too small to be fitted lacks runs that can be named too (`for_a_fit`).
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from gqa_scaling.config import RunConfig, UserError
from gqa_scaling.costs import training_flops, training_flops_formula, training_tokens
from gqa_scaling.experiment.follow_ups import follow_up
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.study.points import MIN_SIZES
from gqa_scaling.study.results import Heads, Results, heads_of, pair, pattern_of
from gqa_scaling.study.shapes import (
    Family,
    family_of,
    nearest_buildable,
    training_keys,
    width_step,
)

Kind = Literal["grid", "size", "seed", "heads", "context", "fit"]
LARGER = 2.0  # the next size of a configuration, times the N of its largest one
TOKENS_PER_PARAM = 20.0  # where runs do not say: Chen et al. 2025 train on as many


@dataclass(frozen=True)
class Proposed:
    """One run that could be done: its shape, training context (tokens, 0 unknown), seed and price.

    `flops` are its training FLOPs on `tokens`; `run` is what trains it, None for others' data.
    """

    name: str
    heads: Heads
    n_layers: int
    d_model: int
    context: int
    seed: int
    tokens: float
    flops: float
    run: RunConfig | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Step:
    """Runs that are worth doing together; one but for a new context length, which runs tell only by
    the differences between them."""

    kind: Kind
    runs: tuple[Proposed, ...]

    @property
    def flops(self) -> float:
        return sum(run.flops for run in self.runs)


@dataclass(frozen=True)
class Proposals:
    """What a study has done, and the runs that it could do."""

    results: Results
    grid: tuple[RunConfig, ...] = ()

    @cached_property
    def reference(self) -> int:
        """The training context length of most runs, the longest of those that tie; 0 unknown."""
        lengths = self.results.context_length.tolist()
        return max(set(lengths), key=lambda t: (lengths.count(t), t))

    @cached_property
    def family(self) -> Family:
        return family_of(self.results)

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every (layers, width) that was run or declared."""
        declared = {(run.model.n_layers, run.model.d_model) for run in self.grid}
        done = set(zip(self.results.n_layers.tolist(), self.results.d_model.tolist(), strict=True))
        return tuple(sorted(declared | done, key=lambda s: s[0] * s[1] ** 2))

    @cached_property
    def seeds(self) -> dict[tuple, set[int]]:
        """The seeds that were run, also of runs left out, by (heads, layers, width, context)."""
        out = dict[tuple, set[int]]()
        for *cell, seed in (*self.results.shapes, *self.results.also_run):
            out.setdefault(tuple(cell), set()).add(seed)
        return out

    @property
    def heads(self) -> list[Heads]:
        """The configurations that were run."""
        return sorted(set(self.results.heads), key=str)

    # ---- one run

    def propose(
        self,
        heads: Heads,
        layers: int,
        width: int,
        context: int | None = None,
        seed: int | None = None,
    ) -> Proposed | None:
        """This run as the study's runs were trained; None where none can be."""
        at = self.reference if context is None else context
        if not self.grid:
            return self._of_others(heads, layers, width, at, seed or 0)
        near = [run for run in self.grid if run.context_length == self.reference] or self.grid
        with suppress(UserError):  # a pattern may not fit, nor a batch hold one sequence
            run = follow_up(near, self.family.model(layers, width, heads))
            run = replace(run, name=run.name.removeprefix("built-"))
            if seed is not None:
                run = replace(run, name=f"{run.name}-seed{seed}", seed=seed)
            if at != run.context_length:
                batch = at * max(1, run.batch_tokens // at)
                name = f"{run.name}-T{at}"
                run = replace(run, name=name, context_length=at, batch_tokens=batch)
            return _declared(run)
        return None

    def _of_others(self, heads: Heads, layers: int, width: int, at: int, seed: int) -> Proposed:
        n = float(self.family.n_of(layers, width, heads))
        known = np.isfinite(self.results.tokens)
        tokens, each = self.results.tokens[known], self.results.n_params[known]
        budget = TOKENS_PER_PARAM * n
        if known.any():
            alike = np.ptp(tokens) < 0.01 * tokens.mean()
            budget = float(tokens.mean() if alike else np.median(tokens / each) * n)
        keys = training_keys(heads, np.array(float(layers)), at) if at else 0.0
        per_token = training_flops_formula(n, at, layers, self.family.head_dim, heads[0], keys=keys)
        name = f"L{layers}-d{width}-h{heads[0]}-kv{heads[1]}" + (f"-seed{seed}" if seed else "")
        name += f"-T{at}" if at != self.reference else ""
        pattern = pattern_of(heads)
        name += f" {pattern.label}" if pattern else ""
        return Proposed(name, heads, layers, width, at, seed, budget, float(per_token) * budget)

    # ---- many

    def declared(self) -> list[Step]:
        """The rest of the grid: of each size the first run that is not done."""
        out: dict[tuple, Step] = {}
        for run in self.grid:
            one = _declared(run)
            where = one.heads, one.n_layers, one.d_model, one.context
            if one.seed not in self.seeds.get(where, ()):
                out.setdefault(where, Step("grid", (one,)))
        return list(out.values())

    def beyond(self, contexts: Sequence[int], contenders: Sequence[Heads]) -> list[Step]:
        """What no grid holds: sizes, seeds, heads and, of the contenders, longer training contexts."""
        at, out = self.reference, list[Step]()

        def add(kind: Kind, runs: Iterable[Proposed | None]) -> None:
            made = tuple(run for run in runs if run is not None)
            if made:
                out.append(Step(kind, made))

        for heads in self.heads:
            done = [s for s in self.sizes if (heads, *s, at) in self.seeds]
            for size in self.sizes:
                if size in done:
                    seed = max(self.seeds[heads, *size, at]) + 1
                    add("seed", [self.propose(heads, *size, seed=seed)])
                else:
                    add("size", [self.propose(heads, *size)])
            if not done or done[-1] == self.sizes[-1]:
                add("size", [self.propose(heads, *self.larger(heads, self.sizes))])
        for heads in self.new_heads():
            for size in self.sizes:
                add("heads", [self.propose(heads, *size)])
        for length in sorted({t for t in contexts if at and t > at}):
            for size in self.sizes:
                new = [h for h in contenders if (h, *size, length) not in self.seeds]
                if len(new) > 1:
                    add("context", [self.propose(h, *size, context=length) for h in new])
        return out

    def new_heads(self) -> list[Heads]:
        """Powers of two up to the largest measured n_h that nobody trained or declared, all dense."""
        known = {h[:2] for h in (*self.heads, *(shape[0] for shape in self.results.also_run))}
        known |= {(run.model.n_heads, run.model.n_kv_heads) for run in self.grid}
        most = 2 ** int(math.log2(max(h for h, _ in known)))
        return [h for h in head_candidates(most) if h not in known]

    def larger(self, heads: Heads, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The (layers, width) of the next size beyond the largest of these."""
        layers, width = max(sizes, key=lambda s: s[0] * s[1] ** 2)
        n = LARGER * float(self.family.formula(layers, width, heads))
        return nearest_buildable(n, heads, self.family.head_dim, sizes, width_step(self.sizes))


def _declared(run: RunConfig) -> Proposed:
    m = run.model
    return Proposed(
        name=run.name,
        heads=heads_of(m.n_heads, m.n_kv_heads, m.pattern),
        n_layers=m.n_layers,
        d_model=m.d_model,
        context=run.context_length,
        seed=run.seed,
        tokens=float(training_tokens(run)),
        flops=float(training_flops(run)),
        run=run,
    )


def budget_assumed(results: Results, grid: Sequence[RunConfig]) -> str:
    """What is assumed of the price of others' runs, in a line; "" where nothing is."""
    assumed = []
    if not grid and not np.isfinite(results.tokens).any():
        assumed.append(f"{TOKENS_PER_PARAM:g} training tokens a parameter")
    if not grid and not results.context_length.all():
        assumed.append("training contexts too short to cost attention anything")
    return f"training FLOPs assume {' and '.join(assumed)}: the runs do not say" if assumed else ""


# ---------------------------------------------------------------------------- too small to fit


def lacking(results: Results) -> dict[Heads, int]:
    """How many sizes each configuration lacks for a curve of its own; none of those that lack none."""
    out = {}
    for heads in sorted(set(results.heads), key=str):
        own = np.array([h == heads for h in results.heads])
        sizes = len(np.unique(results.n_params[own]))
        if sizes < MIN_SIZES:
            out[heads] = MIN_SIZES - sizes
    return out


def too_small(results: Results) -> str:
    """Why curves cannot be fitted to these runs, in a line; "" where they can."""
    short = lacking(results)
    if short:
        told = [f"{pair(h)} has {MIN_SIZES - n}" for h, n in short.items()]
        return f"a curve needs {MIN_SIZES} sizes of each configuration: {', '.join(told)}"
    points, heads = _points(results), len(set(results.heads))
    if points > 2 * heads + 1:
        return ""
    return (
        f"{points} sizes leave nothing to judge the noise of {2 * heads + 1} parameters: one more is "
        "needed"
    )


def _points(results: Results) -> int:
    return len({*zip(results.heads, results.n_params.tolist(), strict=True)})


def for_a_fit(proposals: Proposals) -> list[Step]:
    """The cheapest runs without which no curves can be fitted, those of the grid first."""
    p, short = proposals, lacking(proposals.results)
    lists = {heads: _new_sizes(p, heads, short.get(heads, 0) + 1) for heads in p.heads}
    out = [run for heads, count in short.items() for run in lists[heads][:count]]
    spare = [run for heads in p.heads for run in lists[heads][short.get(heads, 0) :]]
    need = 2 * len(p.heads) + 2 - _points(p.results) - len(out)
    out += sorted(spare, key=lambda run: run.flops)[: max(need, 0)]
    return [Step("fit", (run,)) for run in sorted(out, key=lambda run: run.flops)]


def _new_sizes(p: Proposals, heads: Heads, count: int) -> list[Proposed]:
    """So many runs of sizes that these heads lack: of the grid, of its sizes, then ever larger ones."""
    done = {(layers, width) for own, layers, width, _ in p.seeds if own == heads}
    rest = [step.runs[0] for step in p.declared() if step.runs[0].heads == heads]
    out = {(r.n_layers, r.d_model): r for r in sorted(rest, key=lambda run: run.flops)}
    out = {size: run for size, run in out.items() if size not in done}
    sizes = [size for size in p.sizes if size not in done and size not in out]
    while len(out) + len(sizes) < count:
        sizes.append(p.larger(heads, (*p.sizes, *sizes)))
    made = [p.propose(heads, *size) for size in sizes]
    return [*out.values(), *(run for run in made if run is not None)][:count]
