"""Whether differences between configurations stay as they are at longer training contexts.

That must hold for a fit at one length to carry to longer ones: beyond some T the differences no
longer move (Chen et al. 2025, section 5: all movement below 1% of the loss). What counts is not how
large a movement is but what it does to an answer: at a loss near E 0.1% of it costs several percent.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy.special import fdtrc

from gqa_scaling.config import require
from gqa_scaling.study.baseline import default_baseline
from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.misfit import SUSPICIOUS
from gqa_scaling.study.points import Interval, labels, ranks, size_labels
from gqa_scaling.study.results import Heads, Results, pair
from gqa_scaling.study.uncertainty import LEVEL

FLAT_FROM = 8192  # tokens: where the published claim begins
_MIN_DOF = 2
_DRAWS = 2000


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


@dataclass(frozen=True)
class Effect:
    """What the largest movement that the runs do not exclude would do to an answer.

    The answer's configuration, `heads`, is worse by `nats` at every size, the others stay: to reach
    `loss` (nats) it then takes a larger model, dearer by `change` (0.02 is 2%) of the `objective` at
    `context` tokens; infinite where none gets there. `then` are the cheapest heads in that case.
    """

    heads: Heads
    loss: float
    context: int
    objective: Objective
    nats: float
    change: float
    then: Heads
    indifference: float


Verdict = Literal["flat", "unsure", "small", "moving", "unjudged", "untested"]


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
    effect: Effect | None = None

    @property
    def verdict(self) -> Verdict:
        """Flat, not told apart from flat, moving by less or by more than matters, or untested.

        What matters is the cost of an answer (`judged`), against the question's indifference; without
        an answer the movement is not judged.
        """
        if self.untested or self.movement is None:
            return "untested"
        if self.effect is None:
            return "unjudged"
        within = self.effect.change <= self.effect.indifference
        if self.p_value >= SUSPICIOUS:
            return "flat" if within else "unsure"
        return "small" if within else "moving"

    def sentence(self) -> str:
        if self.verdict == "untested":
            return f"Differences between configurations over T: not tested, {self.untested}."
        assert self.movement is not None
        most = f"{100 * self.movement.most:.2f}% of the loss"
        if self.effect is None:
            found = "No movement found" if self.p_value >= SUSPICIOUS else "Differences move"
            return (
                f"{found} from {self.since:,} tokens on; none above {most}. frontier and report say what "
                "that would do to the cost of an answer."
            )
        e, moves = self.effect, f"one of {most} "
        costs = (
            f"make {pair(e.heads)} {100 * e.change:.1f}% dearer by {OBJECTIVES[e.objective]}"
            if math.isfinite(e.change)
            else f"leave {e.loss:g} nats out of reach of {pair(e.heads)}"
        ) + f" for {e.loss:g} nats at {e.context:,} tokens"
        stays = (
            "and it would stay the cheapest"
            if e.then == e.heads
            else f"and {pair(e.then)} would be the cheapest"
        )
        matters = f"{100 * e.indifference:.6g}%"
        return {
            "flat": f"Flat from {self.since:,} tokens on: a fit at one T carries to longer ones; the "
            f"largest movement that these runs do not exclude, {moves}would {costs}, below {matters}.",
            "unsure": f"No movement found from {self.since:,} tokens on, but these runs do not exclude "
            f"{moves}which would {costs}, {stays}: add sizes or seeds at the longest T before a fit at "
            "one T is carried to longer ones.",
            "small": f"Differences between configurations do move from {self.since:,} tokens on, but "
            f"the largest movement that these runs do not exclude, {moves}would {costs}, below "
            f"{matters}: a fit at one T carries to longer ones that closely and no closer.",
            "moving": f"NOT FLAT from {self.since:,} tokens on: these runs do not exclude {moves}which "
            f"would {costs}, {stays}. A fit at one T does not carry to longer ones; train at the T that "
            "you will serve and fit there with --context.",
        }[self.verdict]

    def to_dict(self) -> dict[str, Any]:
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
    run = {(h, t) for h, t in zip(r.heads, r.context_length, strict=True) if t >= since}
    often = [h for h, count in Counter(h for h, _ in run).items() if count > 1]
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
    if dof[1] < _MIN_DOF:
        why = (
            f"the runs from {since:,} tokens on leave {dof[1]} degrees of freedom to judge the "
            f"noise by, it needs {_MIN_DOF}: add a size or seeds at two lengths"
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
    p_value = float(fdtrc(*dof, ratio))
    return Flatness(since, lengths, base, "", float(ratio), dof, p_value, movement)


def _sizes(r: Results, curve: np.ndarray) -> np.ndarray:
    """A label for each run's size; one for each of its token budgets, where a size has several."""
    size = labels(size_labels(curve, r.n_params, r.n_layers, r.d_model), r.head_dim)
    known = np.nan_to_num(r.tokens, nan=-1.0)
    cell = labels(curve, size, r.context_length)
    many = any(np.ptp(known[cell == c]) > 0 for c in range(cell.max() + 1))
    if not many:
        return size
    return labels(size, ranks(known, labels(curve, size)))  # budgets may follow N: count them off


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
    sigma = np.sqrt(variance * dof / rng.chisquare(dof, (_DRAWS, 1, 1, 1)))
    noise = sigma * rng.standard_normal((_DRAWS, *shape)) / np.sqrt(np.maximum(count, 1))
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
