"""Loss over training context lengths: L(T, N, H) = L(N, H) + delta(T), and whether that may be.

`context_law` estimates an offset for each length together with the curves. `flatness` tests what
must hold for a fit at one length to carry to longer ones, that beyond some T the differences
between configurations no longer move (Chen et al. 2025, section 5: all movement below 1%).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import stats

from gqa_scaling.config import require
from gqa_scaling.study.additive import Additive, Cells, as_fit, cells, estimated
from gqa_scaling.study.choices import Bootstrap
from gqa_scaling.study.fit import (
    LEVEL,
    SUSPICIOUS,
    Fit,
    Interval,
    _flagged,
    interval,
    labels,
    plain,
    size_labels,
    sizes,
)
from gqa_scaling.study.frontier import default_baseline
from gqa_scaling.study.results import Heads, Results, flags, pair

FORMULA = "(a/N)^b + E + delta(T), E and delta shared"
FLAT_FROM = 8192  # tokens: where the published claim begins
FLAT = 0.01  # movement of a relative loss difference that the published study calls flat
MIN_DOF = 2
DRAWS = 2000


def spans_contexts(results: Results) -> bool:
    """Whether the runs were trained at more than one context length."""
    return len(np.unique(results.context_length)) > 1


class OverContexts(Additive):
    """Shared: E at the reference length, and an offset for each other length."""

    def __init__(self, cells: Cells, lengths: tuple[int, ...], reference: int) -> None:
        super().__init__(cells.points)
        others = [t for t in lengths if t != reference]
        self.shared = ("E", *(f"delta{t}" for t in others))
        self.steps = np.full(len(self.shared), np.inf)
        self.columns = np.stack(
            [np.ones(len(cells.context)), *(cells.context == t for t in others)], 1
        ).astype(float)
        self.at_reference = cells.context == reference

    def terms(self, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return shared @ self.columns.T, self.columns[None]

    def linear(self) -> Iterator[tuple[np.ndarray, Any]]:
        yield self.columns, np.asarray

    def limits(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return super().limits(y[:, self.at_reference])


@dataclass(frozen=True)
class ContextLaw:
    """Curves at the reference length and an offset delta for each length, in nats.

    The reference is the length with the most points, the longest of those that tie. `delta` and
    the columns of `delta_draws` follow `lengths`; both are 0 at the reference. `fit` holds the
    curves at the reference, with every run brought there by its delta.
    """

    fit: Fit
    reference: int
    lengths: tuple[int, ...]
    runs: tuple[int, ...]
    delta: np.ndarray
    delta_draws: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; offsets in nats, lengths in tokens."""
        return plain(
            {
                "formula": FORMULA,
                "reference_tokens": self.reference,
                "intervals": self.fit.how,
                "lengths": [
                    {
                        "context_tokens": t,
                        "runs": self.runs[i],
                        "delta_nats": self.delta[i],
                        "delta_interval_nats": interval(self.delta_draws[:, i]),
                    }
                    for i, t in enumerate(self.lengths)
                ],
            }
        )


def context_law(
    results: Results, *, bootstrap: Bootstrap = "shared", refits: int = 1000, seed: int = 0
) -> ContextLaw:
    """Fit the curves and an offset for each training context length together, and bootstrap them.

    Errors may be common to all models of a size, at every length or at one. Raises UserError when
    the runs span one length only or do not say theirs, when one size has several token budgets at
    one length, or when runs are too few.
    """
    r = results
    lengths = tuple(sorted(set(r.context_length.tolist())))
    require(
        len(lengths) > 1,
        f"{r.source}: all runs have context length {lengths[0]}; a context law needs several",
    )
    require(lengths[0] > 0, f"{r.source}: some runs do not say their context_length; fill it in")
    found = cells(r, len(lengths))
    p = found.points
    where = labels(p.curve, p.n, sizes(p), found.context)
    twice = np.flatnonzero(np.bincount(where) > 1)
    if len(twice):
        mine = np.flatnonzero(where == twice[0])
        budgets = ", ".join(f"{t:,.0f}" for t in found.tokens[mine])
        require(
            False,
            f"{r.source}: {p.name[mine[0]]} was trained on {budgets} tokens at context length "
            f"{found.context[mine[0]]}; a context law needs one token budget for each size: name "
            "a length with --context to fit a token law there",
        )
    counts = {t: int((found.context == t).sum()) for t in lengths}
    reference = max(lengths, key=lambda t: (counts[t], t))
    model = OverContexts(found, lengths, reference)
    groups = (sizes(p), labels(sizes(p), found.context))
    best = estimated(model, p, groups, f"{r.source}: the context law", bootstrap, refits, seed)
    others = [t for t in lengths if t != reference]
    delta, draws = np.zeros(len(lengths)), np.zeros((len(best.draws), len(lengths)))
    for i, t in enumerate(others):
        delta[lengths.index(t)] = best.parameters[1 + i]
        draws[:, lengths.index(t)] = best.draws[:, 1 + i]
    offset = delta[np.searchsorted(lengths, found.context)]
    fitted = as_fit(
        r,
        p,
        model,
        best,
        context_length=reference,
        offset=offset,
        more=(0.0, 0.0),
        bootstrap=bootstrap,
        refits=refits,
        seed=seed,
    )
    known = [
        *flags(r),
        f"the runs span T = {', '.join(f'{t:,}' for t in lengths)}: curves and losses are those at "
        f"{reference:,} tokens, every run brought there by its delta(T)",
        *_budgets(found),
    ]
    fitted = _flagged(fitted, known)
    return ContextLaw(fitted, reference, lengths, tuple(counts.values()), delta, draws)


def _budgets(found: Cells) -> list[str]:
    """A warning when one size was trained on other budgets at other lengths."""
    p = found.points
    size = labels(p.curve, p.n, sizes(p))
    for k in range(size.max() + 1):
        budget = found.tokens[size == k]
        if np.nanmax(budget, initial=0) > 1.1 * np.nanmin(budget, initial=np.inf):
            return [
                "one size has other token budgets at other context lengths: delta(T) mixes what "
                "length does with what data does"
            ]
    return []


# ----------------------------------------------------------------------------------- flatness


@dataclass(frozen=True)
class Movement:
    """How far dL = (L - L_base) / L_base of a configuration moves between two context lengths.

    `value` is a share (0.01 is 1%), a mean over the sizes run at both lengths; the interval is
    simultaneous: with 90% confidence no movement of any configuration lies outside its own.
    """

    heads: Heads
    shorter: int
    longer: int
    value: float
    interval: Interval

    @property
    def most(self) -> float:
        """The largest movement, either way, that the interval allows."""
        return max(abs(v) for v in self.interval)


Verdict = Literal["flat", "unsure", "small", "moving", "untested"]


@dataclass(frozen=True)
class Flatness:
    """The F-test of configuration by T at the lengths from `since` on, and the largest movement.

    `untested` says why there is no test; "" where there is one. `baseline` are the heads that dL
    refers to.
    """

    since: int
    lengths: tuple[int, ...]
    baseline: Heads
    untested: str = ""
    statistic: float = float("nan")
    dof: tuple[int, int] = (0, 0)
    p_value: float = float("nan")
    movement: Movement | None = None

    @property
    def verdict(self) -> Verdict:
        """Flat, not told apart from flat, differing but within 1%, moving, or untested."""
        if self.untested or self.movement is None:
            return "untested"
        within = self.movement.most < FLAT
        if self.p_value >= SUSPICIOUS:
            return "flat" if within else "unsure"
        return "small" if within else "moving"

    def sentence(self) -> str:
        """What the test means for a decision, in one or two sentences."""
        if self.verdict == "untested":
            return f"Differences between configurations over T: not tested, {self.untested}."
        assert self.movement is not None
        most = f"{100 * self.movement.most:.2f}%"
        return {
            "flat": f"Flat from {self.since:,} tokens on: a fit at one T carries to longer ones; "
            f"no movement of dL above {most}.",
            "unsure": f"No movement found from {self.since:,} tokens on, but these runs cannot "
            f"exclude one up to {most}: add sizes or seeds at the longest T before a fit at one T "
            "is carried to longer ones.",
            "small": f"Differences between configurations do move from {self.since:,} tokens on, "
            f"by {most} of the loss at most, below the {FLAT:.0%} that the published study calls "
            "flat: a fit at one T carries to longer ones that closely and no closer.",
            "moving": f"NOT FLAT from {self.since:,} tokens on: a fit at one T does not carry to "
            "longer ones; train at the T that you will serve and fit there with --context.",
        }[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; movements as shares, lengths in tokens."""
        told = asdict(self) | {"verdict": self.verdict, "sentence": self.sentence()}
        return plain(told | {"test": "F-test of configuration x T", "level": LEVEL})


def flatness(
    results: Results, since: int = FLAT_FROM, baseline: Heads | None = None, seed: int = 0
) -> Flatness:
    """Test that differences between configurations do not move with T, from `since` tokens on.

    `baseline` are the heads that dL refers to, by default the most query and KV heads of those run
    at two lengths or more.

    An exact F-test in an analysis of variance: every (configuration, size) has a level of its own
    and every (size, T) an offset of its own, so that neither the curves' shape nor errors that the
    models of a size share can pass for movement; what is tested is whether configurations need
    offsets over T of their own. Sizes count where configurations were run at two lengths.
    """
    r = results
    require(since > 0, f"flatness from {since} tokens on must begin above 0")
    held = {h: len({t for g, t in _where(r) if g == h and t >= since}) for h in set(r.heads)}
    often = [h for h, count in held.items() if count > 1]  # run at two lengths or more
    base = baseline or default_baseline(often or r.heads)
    lengths = tuple(t for t in sorted(set(r.context_length.tolist())) if t >= since)
    if len(lengths) < 2:
        found = f"only T = {lengths[0]:,}" if lengths else "none"
        why = f"it needs runs at two context lengths from {since:,} tokens on, there is {found}"
        return Flatness(since, lengths, base, why)
    r = r.select(r.context_length >= since)
    heads = sorted(set(r.heads))
    curve = np.array([heads.index(h) for h in r.heads])
    size = _sizes(r, curve)
    context = np.searchsorted(lengths, r.context_length)
    level, offset = labels(curve, size), labels(size, context)
    null = np.hstack([np.eye(level.max() + 1)[level], np.eye(offset.max() + 1)[offset]])
    own = labels(curve, context)
    q0, q1 = (_basis(m) for m in (null, np.hstack([null, np.eye(own.max() + 1)[own]])))
    dof = (q1.shape[1] - q0.shape[1], len(r) - q1.shape[1])
    if dof[0] < 1:
        why = (
            "it needs a size that two configurations were both run at with two of these lengths"
            + ("" if r.n_layers.all() else "; columns n_layers and d_model say which sizes are one")
        )
        return Flatness(since, lengths, base, why)
    if dof[1] < MIN_DOF:
        why = (
            f"the runs from {since:,} tokens on leave {dof[1]} degrees of freedom to judge the "
            f"noise by, it needs {MIN_DOF}: add a size or seeds at two lengths"
        )
        return Flatness(since, lengths, base, why)
    centred = r.loss - r.loss.mean()
    left0, left1 = (float(((centred - q @ (q.T @ centred)) ** 2).sum()) for q in (q0, q1))
    exact = 1e-22 * float((r.loss**2).sum())  # rounding of losses without noise
    gained = max(left0 - left1, 0.0) if left0 > exact else 0.0
    noise = left1 if left1 > exact else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.divide(gained / dof[0], noise / dof[1]) if gained else 0.0
    movement = _movement(
        r, heads, curve, size, context, lengths, base, noise / dof[1], dof[1], seed
    )
    if movement is None:
        why = f"the baseline {pair(base)} shares no size with others at two of these lengths"
        return Flatness(since, lengths, base, why)
    p_value = float(stats.f.sf(ratio, *dof))
    return Flatness(since, lengths, base, "", float(ratio), dof, p_value, movement)


def _where(r: Results) -> set[tuple[Heads, int]]:
    """The (heads, context length) that were run."""
    return set(zip(r.heads, r.context_length.tolist(), strict=True))


def _sizes(r: Results, curve: np.ndarray) -> np.ndarray:
    """A label for each run's size; one for each of its token budgets, where a size has several."""
    size = labels(size_labels(curve, r.n_params, r.n_layers, r.d_model), r.head_dim)
    known = np.nan_to_num(r.tokens, nan=-1.0)
    cell = labels(curve, size, r.context_length)
    many = any(np.ptp(known[cell == c]) > 0 for c in range(cell.max() + 1))
    if not many:
        return size
    own, rank = labels(curve, size), np.zeros(len(r), int)  # budgets may follow N: count them off
    for c in range(own.max() + 1):
        rank[own == c] = np.unique(known[own == c], return_inverse=True)[1]
    return labels(size, rank)


def _basis(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis of what the columns span."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-9 * s[0]]


def _movement(
    r: Results,
    heads: list[Heads],
    curve: np.ndarray,
    size: np.ndarray,
    context: np.ndarray,
    lengths: tuple[int, ...],
    base: Heads,
    variance: float,
    dof: int,
    seed: int,
) -> Movement | None:
    """The largest movement of dL between two lengths, with its simultaneous interval."""
    shape = (len(heads), size.max() + 1, len(lengths))
    count, total = np.zeros(shape), np.zeros(shape)
    np.add.at(count, (curve, size, context), 1.0)
    np.add.at(total, (curve, size, context), r.loss)
    with np.errstate(invalid="ignore"):
        mean = total / count  # NaN where nothing was run
    rng = np.random.default_rng(seed)
    sigma = np.sqrt(variance * dof / rng.chisquare(dof, (DRAWS, 1, 1, 1)))
    noise = sigma * rng.standard_normal((DRAWS, *shape)) / np.sqrt(np.maximum(count, 1))
    losses = np.concatenate([mean[None], mean + noise])
    if base not in heads:
        return None
    ours = losses[:, [heads.index(base)]]
    relative = (losses - ours) / ours  # (draws, configurations, sizes, lengths)
    found, where = [], []
    for i, j in combinations(range(len(lengths)), 2):
        moved = relative[..., j] - relative[..., i]
        for k, each in enumerate(heads):
            known = ~np.isnan(moved[0, k])
            if each != base and known.any():
                found.append(moved[:, k, known].mean(1))
                where.append((each, lengths[i], lengths[j]))
    if not found:
        return None
    values = np.array(found)  # (movements, draws), the runs' own first
    half = float(np.quantile(np.abs(values[:, 1:] - values[:, :1]).max(0), LEVEL))
    k = int(np.argmax(np.abs(values[:, 0])))
    value = float(values[k, 0])
    return Movement(*where[k], value, (value - half, value + half))
