"""What savings are stated against: heads at every size, the published family, or one whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.baselines import LLAMA3, WholeModel, named
from gqa_scaling.config import Question, require
from gqa_scaling.costs import n_formula
from gqa_scaling.study.clock import WHOLE
from gqa_scaling.study.curves import Curves
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.results import Heads, pair, pattern_of
from gqa_scaling.study.serving import Costs, Deployment
from gqa_scaling.study.shapes import Family, shapes
from gqa_scaling.study.strays import StrayedLaw

Baseline = Heads | WholeModel | str  # a text is the published family, LLAMA3
_LLAMA3_KV = 8  # KV heads, fewer where a small model has fewer query heads
_GRID = 1000  # sizes of the family


def default_baseline(heads: Sequence[Heads]) -> Heads:
    """The most query heads and, among those, the most KV heads; a dense one where there is any."""
    return max([h for h in heads if pattern_of(h) is None] or heads)


def named_baseline(question: Question) -> Baseline | None:
    return named(question.baseline) if isinstance(question.baseline, str) else question.baseline


def baseline_of(question: Question, trained: Sequence[Heads]) -> Baseline:
    """The question's baseline, by default that of the configurations that were trained."""
    return named_baseline(question) or default_baseline(trained)


def curves_for(baseline: Baseline) -> tuple[Heads, ...]:
    """The heads whose curve the baseline needs; none for the family, whose heads change with size."""
    if isinstance(baseline, WholeModel):
        return (baseline.heads,)
    return () if isinstance(baseline, str) else (baseline,)


def label(baseline: Baseline) -> str:
    if isinstance(baseline, WholeModel):
        return f"{pair(baseline.heads)} L{baseline.n_layers} d{baseline.d_model}"
    return "Llama-3 (d/d_h,8)" if isinstance(baseline, str) else pair(baseline)


def in_words(baseline: Baseline) -> str:
    if isinstance(baseline, WholeModel):
        return (
            f"the one model of {baseline.n_heads} query heads, {baseline.n_kv_heads} KV heads, "
            f"{baseline.n_layers} layers and width {baseline.d_model}"
        )
    if isinstance(baseline, str):
        return (
            "the published Llama-3 family: 8 KV heads and as many query heads as fill the width, "
            "d / d_h, at every size"
        )
    return f"{baseline[0]} query and {baseline[1]} KV heads at every size, of the size that reaches the loss"


@dataclass(frozen=True)
class Reference:
    """The baseline at one target loss and context: the point estimate first, then every refit.

    `k` is the index of its configuration among the curves, None where its heads or its size are
    not a curve's. `n` is infinite in rows in which it never reaches the loss.
    """

    n: np.ndarray
    loss: np.ndarray
    costs: Costs
    k: int | None = None


def reference(
    baseline: Baseline,
    fit: Fit,
    curves: Curves,
    law: StrayedLaw | None,
    deployment: Deployment,
    targets: np.ndarray,
) -> Reference:
    """The baseline at the target losses (rows,), in nats, of the curves' rows.

    A whole model is itself whatever the target. Raises UserError for the family without a `law`.
    """
    if isinstance(baseline, WholeModel):
        size, loss = whole_model(baseline, fit, curves, deployment.family)
        n, shape = np.full_like(loss, size), (baseline.n_layers, baseline.d_model)
        costs = deployment.costs_of_model(n, baseline.heads, shape)
        return Reference(n, loss, deployment.drawn(costs, WHOLE))
    if isinstance(baseline, str):
        return _llama3(fit, law, deployment, targets)
    k = fit.index(baseline)
    n = deployment.family.within(curves.n_star(targets)[:, k], baseline)
    costs = deployment.drawn(deployment.costs(n, baseline), pair(baseline))
    return Reference(n, targets, costs, k)


def whole_model(
    model: WholeModel, fit: Fit, curves: Curves, family: Family
) -> tuple[float, np.ndarray]:
    """N of the model as the fit counts it, and its losses in nats, one for each row of the curves."""
    n = float(family.n_of(model.n_layers, model.d_model, model.heads))
    return n, curves.loss(fit.index(model.heads), n)


def _llama3(
    fit: Fit, law: StrayedLaw | None, deployment: Deployment, targets: np.ndarray
) -> Reference:
    """The family's sizes that reach the targets, between the sizes of the study's own ladder.

    Chen et al. 2025, section 5: n_h = d / d_h, real-valued between sizes, and 8 KV heads.
    """
    if law is None:
        require(
            False,
            f"{fit.source}: baseline {LLAMA3} has other heads at each size and needs a joint law: more "
            "configurations, and no --law separate",
        )
        raise AssertionError
    family = deployment.family
    x, layers, width = llama3_sizes(family)
    n_heads = width / family.head_dim
    heads = np.stack([n_heads, np.minimum(n_heads, _LLAMA3_KV)], 1)
    losses = law.losses(heads, np.exp(x), LLAMA3)
    found = np.array([_crossing(x, row, t) for row, t in zip(losses, targets, strict=True)])
    at = np.where(np.isfinite(found), found, x[0])
    layers, width = (np.interp(at, x, v) for v in (layers, width))
    own: Any = (width / family.head_dim, np.minimum(width / family.head_dim, _LLAMA3_KV))
    n = np.where(np.isfinite(found), family.counted(layers, width, own), np.inf)
    layers, width = (np.where(np.isfinite(n), v, np.inf) for v in (layers, width))
    costs = deployment.costs_of_shape(n, own, layers, width, deployment.context)
    return Reference(n, targets, deployment.drawn(costs, LLAMA3))


def llama3_sizes(family: Family) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of the published family within reach: ln N_b, ascending, and their layers and widths."""
    layers, width = np.array(family.ladder, float).T
    ends = np.log(n_formula(layers, width, 0, 0))
    reach = np.log(family.reach((_LLAMA3_KV, _LLAMA3_KV)))
    x = np.linspace(reach[0], min(reach[1], ends.max() + 12), _GRID)
    return x, *shapes(np.exp(x), (0, 0), family.head_dim, family.ladder)


def _crossing(x: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The least x at which the losses have fallen to the target, straight between; inf for none."""
    below = losses <= target
    if not below.any():
        return np.inf
    i = int(np.argmax(below))
    if i == 0:
        return float(x[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))
