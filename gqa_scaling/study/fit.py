"""A fit: the loss curves L(N; H) of all configurations, how sure they are, and what to beware of.

This is step 2 of Chen et al. 2025, section 4.1: (a/N)^b + E for each configuration, or one law for
all of them. `models` holds the laws, `solver` the least squares, `uncertainty` and `noise` what the
intervals rest on.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gqa_scaling.config import between, require
from gqa_scaling.study.choices import Law
from gqa_scaling.study.fitted import Fit, flagged
from gqa_scaling.study.misfit import misfit
from gqa_scaling.study.models import LAWS, Model, SeparateCurves, joint
from gqa_scaling.study.noise import likeliest, pooled
from gqa_scaling.study.points import Points, points
from gqa_scaling.study.results import Results, flags
from gqa_scaling.study.solver import refit, solve_point
from gqa_scaling.study.uncertainty import REFITS, influence, strange


def fit(
    results: Results,
    *,
    context_length: int | None = None,
    law: Law = "separate",
    refits: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit a curve for each head configuration with a shared E, and bootstrap it.

    `law` is "separate" (u and b of each configuration free) or one law for all configurations:
    "product" or "fading" (see `models.formula`); joint laws also fit what sparsity costs where
    configurations differ in density. `context_length` names the training length when the runs span
    several. Raises UserError when the runs are too few or cannot be compared, or when most refits
    fail.
    """
    require(law in LAWS, f"law={law!r} must be one of {', '.join(LAWS)}")
    p = points(results, context_length, joint=law != "separate")
    model = make_model(law, p, results.head_dim[0])
    require(
        len(p.n) > len(model.names),
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
        refits=refits,
        seed=seed,
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
    refits: int,
    seed: int,
    remedy: str = "add runs, of more sizes or with several seeds",
    law: Law = "separate",
    context_length: int | None = None,
) -> Fit:
    """Fit the model to the points and bootstrap it; the flags of the `Fit` are yet to be set.

    `groups` are ways to label the points whose errors may be common (a size whatever else, or a
    size in one setting); the one that the residuals speak for most is used. `title` names what is
    fitted, and `remedy` says what to do where it cannot be. Raises UserError for a number of refits outside
    100 to 10,000, and when half of them or more fail: the others are then a selection, and no interval comes from none.
    """
    between("refits", refits, *REFITS)
    w = p.replicates.astype(float)
    best = solve_point(model, p.loss, w)
    predicted = model.predict(best.parameters[None])[0]
    residual = p.loss - predicted
    leverage, change, absorbed = influence(best.absorbing, w, residual)
    seeds, dof = p.noise_dof * (p.noise or 0.0) ** 2, len(p.n) - absorbed + p.noise_dof
    require(
        dof > 0,
        f"{results.source}: {title}: {len(p.n)} points leave nothing to judge the noise of "
        f"{absorbed} parameters; {remedy}",
    )
    squares, free = float((w * residual**2).sum()), dof - p.noise_dof
    judging, more = pooled(squares, free, seeds, p.noise_dof)
    odd = strange(residual, w, leverage, judging, free + more)
    common = likeliest(residual, best.absorbing, w, groups, seeds, p.noise_dof, seed)
    noise = common.draw(refits, np.random.default_rng(seed))
    y = np.maximum(predicted + noise, 1e-3 * p.loss)  # losses are above 0
    rows, _, done = refit(model, y, np.tile(w, (refits, 1)), np.tile(best.parameters, (refits, 1)))
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
        sigma=float(np.sqrt((squares + seeds) / dof)),
        strange="" if odd is None else str(p.name[odd]),
        rank=absorbed + bool(best.at_bound),
        converged=best.converged,
        at_bound=best.at_bound,
        shared=common,
        misfit=misfit(p, model, best, residual, groups, seed),
        refits_failed=failed,
        refits=refits,
        seed=seed,
    )


def make_model(law: Law, p: Points, head_dim: int, seen: np.ndarray | None = None) -> Model:
    """The model of a law for these points, to be fitted to those that `seen` marks, or to all."""
    return SeparateCurves(p) if law == "separate" else joint(law, p, head_dim, seen)


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
