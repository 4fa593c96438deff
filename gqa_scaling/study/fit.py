"""A fit: the loss curves L(N; H) of all configurations, how sure they are, and what to beware of.

This is step 2 of Chen et al. 2025, section 4.1: (a/N)^b + E for each configuration, or one law for
all of them. `models` holds the laws, `solver` the least squares, `uncertainty` and `noise` what the
intervals rest on. What others need of a fit (`Fit`, `interval`, `plain`, `LEVEL`, ...) is imported
from here.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gqa_scaling.config import between, require
from gqa_scaling.study.choices import Bootstrap, Law
from gqa_scaling.study.fitted import Fit as Fit
from gqa_scaling.study.fitted import flagged as flagged
from gqa_scaling.study.fitted import plain as plain
from gqa_scaling.study.models import LAWS, Model, SeparateCurves, joint
from gqa_scaling.study.noise import estimate
from gqa_scaling.study.points import Interval as Interval
from gqa_scaling.study.points import Points, points
from gqa_scaling.study.results import Results, flags
from gqa_scaling.study.solver import refit, solve_point
from gqa_scaling.study.uncertainty import (
    BOOTSTRAPS,
    REFITS,
    clipped,
    influence,
    pair_counts,
    rank,
    residual_noise,
    trust,
)
from gqa_scaling.study.uncertainty import LEVEL as LEVEL
from gqa_scaling.study.uncertainty import interval as interval

_SPOILED = 0.05  # weight below which a robust fit takes a run for spoiled
_ROUNDS = 8  # of a robust fit, each with the weights that the one before gave
_STRENGTHS = tuple(np.geomspace(1e-3, 1e5, 25))  # of the ridge of law "pooled"


@dataclass(frozen=True)
class Refitting:
    """How a law is fitted again and again; UserError for what cannot be.

    `bootstrap` "shared" draws independent errors and errors common to a group, each as large as the
    runs allow; "residual" redraws the residuals, scaled for the freedom the fit took; "pairs"
    redraws the points of each curve. `robust` weighs runs far off their curve down (Tukey's
    biweight, scaled by the median absolute residual).
    """

    bootstrap: Bootstrap = "shared"
    robust: bool = False
    refits: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        known = self.bootstrap in BOOTSTRAPS
        require(known, f"bootstrap={self.bootstrap!r} must be one of {', '.join(BOOTSTRAPS)}")
        between("refits", self.refits, *REFITS)


def fit(
    results: Results,
    *,
    context_length: int | None = None,
    law: Law = "separate",
    bootstrap: Bootstrap = "shared",
    robust: bool = False,
    refits: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit a curve for each head configuration with a shared E, and bootstrap it.

    `law` is "separate" (u and b of each configuration free) or one law for all configurations:
    "product", "sum", or "pooled" (see `models.formula`); joint laws also fit what sparsity costs
    where configurations differ in density. `context_length` names the training length when the runs
    span several. For `bootstrap` and `robust` see `Refitting`. Raises UserError when the runs are
    too few or cannot be compared, or when most refits fail.
    """
    how = Refitting(bootstrap, robust, refits, seed)
    require(law in LAWS, f"law={law!r} must be one of {', '.join(LAWS)}")
    p = points(results, context_length, joint=law != "separate")
    model = make_model(law, p, results.head_dim[0])
    require(
        len(p.n) > int((model.ridge == 0).sum()),
        f"{results.source}: too few runs to fit: {len(p.n)} points leave nothing to judge the noise "
        f"of law {law!r} by",
    )
    fitted = fit_model(
        results,
        p,
        model,
        (p.size,),
        law=law,
        title=f"law {law!r}",
        how=how,
        remedy="add sizes, or fit a law with fewer parameters",
        context_length=context_length,
    )
    return flagged(fitted, known_of(results))


def fit_model(
    results: Results,
    p: Points,
    model: Model,
    groups: Sequence[np.ndarray],
    *,
    title: str,
    how: Refitting,
    remedy: str = "add runs, of more sizes or with several seeds",
    law: Law = "separate",
    context_length: int | None = None,
) -> Fit:
    """Fit the model to the points and bootstrap it; the flags of the `Fit` are yet to be set.

    `groups` are ways to label the points whose errors may be common (a size whatever else, or a
    size in one setting); the one that the residuals speak for most is used. `title` names what is
    fitted, and `remedy` says what to do where it cannot be. Raises UserError when half of the refits
    or more fail: the others are then a selection, and no interval comes from none.
    """
    refits = how.refits
    w, ridge = p.replicates.astype(float), model.ridge
    best, trusted = solve_point(model, p.loss, w), np.ones(len(p.n))
    leverage, _ = influence(best.absorbing, w, p.loss, ridge)
    lean = 1 / np.sqrt(np.maximum(1 - leverage, 0.05))  # a curve follows a run it rests on
    for _ in range(_ROUNDS if how.robust else 0):
        away = p.loss - model.predict(best.parameters[None])
        trusted = trust(lean * away, w)[0]
        best = solve_point(model, p.loss, w * trusted, best.parameters)
    predicted = model.predict(best.parameters[None])[0]
    residual, spoiled = p.loss - predicted, trusted < _SPOILED
    noise_residual = residual
    if how.robust:
        noise_residual = np.where(spoiled, 0, clipped(residual, w, len(model.names)))
    leverage, change = influence(best.absorbing, w * trusted, residual, ridge)
    seeds = p.noise_dof * (p.noise or 0.0) ** 2
    dof = max(len(p.n) - spoiled.sum() - leverage.sum(), 1.0) + p.noise_dof
    sigma = float(np.sqrt(((w * noise_residual**2).sum() + seeds) / dof))
    ways = [
        estimate(noise_residual, best.absorbing, w, group, seeds, p.noise_dof, how.seed)
        for group in groups
    ]
    common = min(ways, key=lambda noise: 1.0 if noise.p_value is None else noise.p_value)
    rng = np.random.default_rng(how.seed)
    y, weights = np.tile(p.loss, (refits, 1)), np.tile(w, (refits, 1))
    if how.bootstrap == "pairs":
        weights = w * pair_counts(p.curve, refits, rng)
    else:
        if how.bootstrap == "shared":
            noise = common.draw(refits, rng)
        else:
            noise = residual_noise(noise_residual, w, leverage, sigma, dof, refits, rng)
        y = np.maximum(predicted + noise, 1e-3 * p.loss)  # losses are above 0
    rows, _, done = refit(model, y, weights, np.tile(best.parameters, (refits, 1)))
    for _ in range(_ROUNDS if how.robust else 0):
        again = weights * trust(lean * (y - model.predict(rows)), weights)
        rows, _, done = refit(model, y, again, rows)
    failed = int((~done).sum())
    require(
        2 * failed < refits,
        f"{results.source}: {title}: {failed} of {refits} refits did not converge: these runs do "
        f"not determine it; {remedy}",
    )
    return Fit(
        source=results.source,
        count=results.count,
        points=p,
        context_length=context_length,
        law=law,
        curves=model.curves(best.parameters),
        draws=model.curves(rows[done]),
        names=model.names,
        constant_names=model.constants,
        parameters=best.parameters,
        parameter_draws=rows[done],
        predicted=predicted,
        leverage=leverage,
        influence=change,
        sigma=sigma,
        spoiled=tuple(p.name[spoiled].tolist()),
        rank=rank(best.jacobian, w * trusted, ridge),
        converged=best.converged,
        at_bound=best.at_bound,
        shared=common,
        refits_failed=failed,
        **vars(how),
    )


def require_no_pairs(bootstrap: Bootstrap) -> None:
    """Refuse to redraw points for a law with terms that curves share besides E.

    Points redrawn may leave such a term without any run.
    """
    require(
        bootstrap != "pairs",
        f"bootstrap={bootstrap!r} redraws the points of one curve and does not serve runs of "
        "several training contexts or token budgets; use shared or residual",
    )


def make_model(law: Law, p: Points, head_dim: int, seen: np.ndarray | None = None) -> Model:
    """The model of a law for these points; UserError when it needs shapes or configurations.

    The strength of the ridge of "pooled" is the one that predicts left-out points best (their
    error by leverage, not by refitting), of the points that `seen` marks, or of all without it.
    """
    if law == "separate":
        return SeparateCurves(p)
    model = joint(law, p, head_dim, _STRENGTHS[0])
    if law != "pooled":
        return model
    w = p.replicates * (np.ones(len(p.n)) if seen is None else seen)
    begin, errors = solve_point(model, p.loss, w).parameters, []
    for strength in _STRENGTHS:
        trial = joint(law, p, head_dim, strength)
        found = solve_point(trial, p.loss, w, begin)
        residual = p.loss - trial.predict(found.parameters[None])[0]
        leverage, _ = influence(found.absorbing, w, residual, trial.ridge)
        errors.append(float((w * (residual / np.maximum(1 - leverage, 1e-3)) ** 2).sum()))
    return joint(law, p, head_dim, _STRENGTHS[int(np.argmin(errors))])


def brought(
    fitted: Fit,
    model: Model,
    offset: np.ndarray,
    more: tuple[np.ndarray | float, np.ndarray | float] = (0.0, 0.0),
) -> Fit:
    """The fit in one setting: its curves there, and every point brought there.

    `offset` is taken from each point; `more` is what the setting adds to E, for the best parameters
    and for each draw; all in nats.
    """
    return dataclasses.replace(
        fitted,
        points=dataclasses.replace(fitted.points, loss=fitted.points.loss - offset),
        predicted=fitted.predicted - offset,
        curves=model.curves(fitted.parameters, more[0]),
        draws=model.curves(fitted.parameter_draws, more[1]),
    )


def known_of(results: Results) -> tuple[str, ...]:
    """What must be known of the runs before any fit."""
    return *flags(results), *_budget_flag(results)


def _budget_flag(results: Results) -> list[str]:
    """A warning when neither tokens nor tokens per parameter are the same for all runs."""
    tokens = np.asarray(results.tokens, float)
    known = np.isfinite(tokens)
    if not known.any():
        return []
    for budget in (tokens[known], tokens[known] / results.n_params[known]):
        if budget.max() <= 1.1 * budget.min():
            return []
    return [
        "neither tokens nor tokens per parameter are the same for all runs: the curves mix what size "
        "does with what data does"
    ]
