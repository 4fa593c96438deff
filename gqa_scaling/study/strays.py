"""One law for all configurations, and how far each strays from it: trained ones and those predicted.

    ln(L - E) of configuration H = the law's + s_H - t_H x,  x = ln N_b, centred

s_H and t_H are normal with mean 0 and two spreads that all configurations share (partial pooling),
so that trained and predicted configurations stand on one scale. The strays of a configuration without
runs are unknown: every refit draws them anew. A trained one with sizes enough has a curve of its own,
and its strays are what lies between that and the law; E is then that of these curves. With fewer
sizes its strays are what its runs say, shrunk towards 0 by as much as their noise could have made them.

Curves of their own are not shrunk, although that would make them surer where the law is true: where
slopes differ systematically with heads, shrunk ones and an E that the law bends leave out the truth
too often (docs/estimation.md).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.costs import n_formula
from gqa_scaling.study.curves import Curves, centred
from gqa_scaling.study.fit import make_model
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.misfit import misfit
from gqa_scaling.study.models import Model, SeparateCurves
from gqa_scaling.study.noise import Noise, estimate
from gqa_scaling.study.points import Points
from gqa_scaling.study.results import Heads
from gqa_scaling.study.solver import Solution, refit, solve_point

SPREADS = (0.02, 0.01)  # of s_H and t_H: the scales of what is believed before any run
OWN = (5, 4)  # configurations with so many sizes, for these to have curves of their own
_ITERATIONS = 300  # most refits need ten; those still on their way along a flat valley are kept
_GRID = np.r_[0.0, np.geomspace(0.05, 20, 24)]  # of a spread, in those scales


@dataclass(frozen=True)
class Strays:
    """The likely spreads of s_H and t_H, and the noise of runs around their own curve.

    `loading` (points, 2) are the derivatives of each loss by the strays of its configuration, in
    nats; `gram` (heads, 2, 2) their weighted products. `spreads` (grid, 2) have `probability`.
    """

    points: Points
    weight: np.ndarray
    loading: np.ndarray
    gram: np.ndarray
    spreads: np.ndarray
    probability: np.ndarray
    noise: Noise

    def most_likely(self, residual: np.ndarray, spreads: np.ndarray) -> np.ndarray:
        """The strays (rows, heads, 2) given residuals (.., points) and spreads (rows, 2)."""
        each = (self.weight * residual)[..., None] * self.loading
        along = np.einsum("...pi,pk->...ki", each, _members(self.points), optimize=True)
        shrinking = _shrinking(self.gram, spreads / self.noise.independent)
        return (shrinking @ along[..., None])[..., 0]

    def added(self, strays: np.ndarray) -> np.ndarray:
        """What strays (.., heads, 2) add to the losses (.., points), in nats."""
        return (strays[..., self.points.curve, :] * self.loading).sum(-1)


def _members(p: Points) -> np.ndarray:
    return np.eye(len(p.heads))[p.curve]


def _shrinking(gram: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """(D^-1 + G)^-1 with D = diag(ratio^2), for rows of spreads to noise (rows, heads, 2, 2)."""
    prior = (ratio**2)[:, None, :, None] * np.eye(2)
    return prior @ np.linalg.inv(np.eye(2) + gram @ prior)


def estimate_strays(fit: Fit, model: Model, weight: np.ndarray) -> Strays:
    """How far the configurations stray from a joint law, from what it leaves of their losses.

    The noise is judged by what is left within configurations, the two spreads by the restricted
    likelihood of the linearised law on a grid, with half-Cauchy priors (Gelman 2006, Bayesian
    Analysis 1:515) of scales `SPREADS`: few configurations say little, and whatever spread they allow
    is drawn by the refits. Errors that a size's runs share move all configurations alike and
    are no strays; only the noise has them.
    """
    p = fit.points
    jacobian = model.jacobian(fit.parameters[None])[0]
    if fit.at_bound:
        jacobian[:, 0] = 0.0  # an E that its bound holds has taken nothing from the residuals
    law = model.predict(fit.parameters[None])[0]
    excess, residual, own = law - fit.parameters[0], p.loss - law, _members(p)
    loading = np.stack([excess, -excess * model.x], 1)
    absorbing = np.hstack([jacobian, *(own * column[:, None] for column in loading.T)])
    seeds = p.noise_dof * (p.noise or 0.0) ** 2
    seen = np.maximum(weight, 1e-9)  # noise is drawn for every point, also for those left aside
    noise = estimate(residual, absorbing, seen, p.size, seeds, p.noise_dof, fit.seed)
    sigma = noise.independent
    gram = np.einsum("pk,p,pi,pj->kij", own, weight, loading, loading, optimize=True)
    grids = np.meshgrid(*(_GRID * scale for scale in SPREADS), indexing="ij")
    spreads = np.stack([grid.ravel() for grid in grids], 1)
    # The law's own directions as columns of unit length, then the residuals.
    root = np.sqrt(weight)[:, None]
    basis, strength, _ = np.linalg.svd(root * jacobian, full_matrices=False)
    columns = np.column_stack([basis[:, strength > 1e-10 * strength[0]], root[:, 0] * residual])
    along = np.einsum("pk,pi,pa->kia", own, root * loading, columns, optimize=True)
    shrinking = _shrinking(gram, spreads / sigma)
    products = columns.T @ columns  # c' V^-1 c, by Woodbury, in units of sigma
    products = products - np.einsum("kia,gkij,kjb->gab", along, shrinking, along, optimize=True)
    blocks = np.eye(2) + gram * ((spreads / sigma) ** 2)[:, None, None, :]
    inside, across = products[:, :-1, :-1], products[:, :-1, -1:]
    left = products[:, -1, -1] - (across * np.linalg.solve(inside, across)).sum((1, 2))
    cost = np.linalg.slogdet(blocks)[1].sum(1) + np.linalg.slogdet(inside)[1] + left / sigma**2
    edges = np.r_[0.0, _GRID[1] / 2, np.sqrt(_GRID[1:-1] * _GRID[2:]), _GRID[-1]]
    believed = np.diff(np.arctan(edges))
    probability = np.exp((cost.min() - cost) / 2) * np.outer(believed, believed).ravel()
    return Strays(p, weight, loading, gram, spreads, probability / probability.sum(), noise)


@dataclass(frozen=True)
class StrayedLaw:
    """A joint law with the strays of all configurations, refitted as often as the fit behind it.

    Each refit draws spreads, noise, and where within their spreads the strays lie, and fits the law
    and the strays to the losses so moved: for a linear law that is a draw from the posterior of the
    mixed model (perturbed, then optimised). `own` (1 + refits, heads, 2) are the strays of the trained
    configurations and `rows` the parameters of the law, the point estimate first.
    """

    fit: Fit
    head_dim: int
    rows: np.ndarray
    own: np.ndarray
    spreads: np.ndarray  # (refits, 2), of each refit

    def model(self, heads: Sequence[Heads]) -> Model:
        """The law over the trained configurations and then these."""
        p = self.fit.points
        whole = dataclasses.replace(
            p, heads=(*p.heads, *heads), density=np.r_[p.density, np.ones(len(heads))]
        )
        return make_model(self.fit.law, whole, self.head_dim)

    def unseen(self, heads: Heads | str) -> np.ndarray:
        """Strays (1 + refits, 2) of a configuration without runs: the same whenever it is asked."""
        label = list(str(heads).encode())
        rng = np.random.default_rng([self.fit.seed, *label])
        return np.vstack([np.zeros(2), rng.standard_normal(self.spreads.shape) * self.spreads])

    def fit_of(self, heads: Sequence[Heads]) -> Fit:
        """The fit with curves of these configurations after those of the trained ones."""
        more = tuple(h for h in dict.fromkeys(heads) if h not in self.fit.heads)
        p, model = self.fit.points, self.model(more)
        own = [self.own, *(self.unseen(h)[:, None] for h in more)]
        whole = _strayed(model.curves(self.rows), np.concatenate(own, 1))
        density = np.r_[p.density, np.ones(len(more))]
        first, rest = ({"floor": whole.floor[i], "u": whole.u[i], "b": whole.b[i]} for i in _PARTS)
        return dataclasses.replace(
            self.fit,
            points=dataclasses.replace(p, heads=(*p.heads, *more), density=density),
            curves=dataclasses.replace(whole, **first),
            draws=dataclasses.replace(whole, **rest),
        )

    def losses(self, heads: np.ndarray, backbone: np.ndarray, label: str) -> np.ndarray:
        """Losses in nats (1 + refits, models) of models of one family, named by `label`.

        Each has real-valued heads (models, 2) of its own and N_b parameters in its backbone. The
        family strays from the law as one configuration does.
        """
        k = len(self.fit.heads)
        curves = self.model([(h, kv) for h, kv in heads.tolist()]).curves(self.rows)
        curves = dataclasses.replace(curves, u=curves.u[:, k:], b=curves.b[:, k:])
        curves = _strayed(curves, np.repeat(self.unseen(label)[:, None], len(heads), 1))
        ends = curves.floor[:, None], curves.centre[0]
        return np.asarray(centred(backbone, curves.u, curves.b, *ends))


_PARTS: tuple[Any, ...] = (0, slice(1, None))  # the point estimate, and the refits


def _strayed(curves: Curves, strays: np.ndarray) -> Curves:
    return dataclasses.replace(curves, u=curves.u + strays[..., 0], b=curves.b + strays[..., 1])


@dataclass(frozen=True)
class _OwnCurves:
    """Curves in ln N_b of each configuration with sizes enough, `whose` (heads,), with one E."""

    whose: np.ndarray
    weight: np.ndarray
    model: Model
    best: Solution

    def refitted(self, y: np.ndarray) -> tuple[Curves, np.ndarray]:
        """The curves for every row of losses (rows, points), and which rows converged."""
        w, start = (np.tile(v, (len(y), 1)) for v in (self.weight, self.best.parameters))
        rows, cost, _ = refit(self.model, y, w, start, iterations=_ITERATIONS)
        return self.model.curves(rows), np.isfinite(cost)


def _own_curves(p: Points, weight: np.ndarray) -> _OwnCurves | None:
    """None where too few configurations have sizes enough."""
    sizes = [len(np.unique(p.n[p.curve == k])) for k in range(len(p.heads))]
    least, enough = OWN
    whose = np.array(sizes) >= enough
    if whose.sum() < least:
        return None
    backbone = dataclasses.replace(p, n=n_formula(p.n_layers, p.d_model, 0, 0))
    model, seen = SeparateCurves(backbone), weight * whose[p.curve]
    return _OwnCurves(whose, seen, model, solve_point(model, p.loss, seen))


def strayed_law(fit: Fit, head_dim: int) -> StrayedLaw:
    """Refit a joint law together with how far each configuration strays from it.

    `fit.sigma` becomes the noise of one run around its own configuration's curve; where all have
    curves of their own, `fit.misfit` and `fit.at_bound` are those of these curves.
    """
    p, refits = fit.points, fit.refits
    model = make_model(fit.law, p, head_dim)
    weight = p.replicates.astype(float)
    strays, rng = estimate_strays(fit, model, weight), np.random.default_rng(fit.seed)
    chosen = rng.choice(len(strays.probability), refits, p=strays.probability)
    spreads = strays.spreads[chosen]
    moved = rng.standard_normal((refits, len(p.heads), 2)) * spreads[:, None]
    noisy = np.vstack([p.loss, p.loss + strays.noise.draw(refits, rng)])  # the point estimate first
    y = noisy - strays.added(np.concatenate([np.zeros_like(moved[:1]), moved]))
    noisy, y = (np.maximum(each, 1e-3 * p.loss) for each in (noisy, y))  # losses are above 0
    weights, start = (np.tile(v, (len(y), 1)) for v in (weight, fit.parameters))
    alone = _own_curves(p, weight)
    curves, found = alone.refitted(noisy) if alone else (None, np.ones(len(y), bool))
    limits = (curves.floor, curves.floor) if curves else None
    rows, cost, _ = refit(model, y, weights, start, limits, iterations=_ITERATIONS)
    left = y - model.predict(rows)
    each = strays.most_likely(left[0], strays.spreads)
    point = np.einsum("g,gki->ki", strays.probability, each)
    own = np.concatenate([point[None], moved + strays.most_likely(left[1:], spreads)])
    fitted, done = fit, np.isfinite(cost) & found
    if alone and curves:
        law = model.curves(rows)
        u = curves.u - curves.b * (model.centre - curves.centre)
        own = np.where(alone.whose[:, None], np.stack([u - law.u, curves.b - law.b], -1), own)
        if alone.whose.all():
            residual = p.loss - alone.model.predict(alone.best.parameters[None])[0]
            given = p, alone.model, alone.best, residual, (p.size,), fit.seed
            fitted = dataclasses.replace(fit, misfit=misfit(*given), at_bound=alone.best.at_bound)
    done[0] = True
    floor, strayed = rows[0, 0], own[0, p.curve, 0] - own[0, p.curve, 1] * model.x
    fitted = dataclasses.replace(
        fitted,
        predicted=floor + (model.predict(rows[:1])[0] - floor) * np.exp(strayed),
        sigma=float(np.hypot(strays.noise.independent, strays.noise.shared or 0.0)),
        shared=strays.noise,
        refits_failed=int((~done).sum()),
    )
    return StrayedLaw(fitted, head_dim, rows[done], own[done], spreads[done[1:]])
