"""How far runs stray from their curves: independent noise, and errors that a size's runs share.

One learning rate for all models of a size makes such shared errors: curves fitted to them lean
together, and a bootstrap of independent residuals would call the floor E surer than it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import fdtrc

from gqa_scaling.config import require

POOLED = 0.25  # p-value of the curves' misses against seeds from which both are taken for one noise
_RATIOS = np.r_[0.0, np.geomspace(0.02, 20.0, 70)]  # of the shared to the independent deviation


@dataclass(frozen=True)
class Noise:
    """Restricted likelihood of two variance components, given residuals and a Jacobian.

    `independent` and `shared` are the most likely standard deviations in nats of one run and of
    one size; `p_value` is that of a likelihood ratio as large as seen when nothing is shared.
    `shared` and `p_value` are None where the runs cannot tell the two apart, as those of one
    configuration cannot: only their sum is then known.
    """

    independent: float
    shared: float | None
    p_value: float | None
    loading: np.ndarray  # (sizes, points): which points a size's error moves
    weight: np.ndarray
    dof: int
    ratio_probability: np.ndarray
    scale: np.ndarray  # most likely variance at each ratio

    def draw(self, refits: int, rng: np.random.Generator) -> np.ndarray:
        """Fresh noise for every refit, its two deviations drawn from what the runs allow."""
        k = rng.choice(len(_RATIOS), refits, p=self.ratio_probability)
        sigma = np.sqrt(self.scale[k] * self.dof / rng.chisquare(self.dof, refits))[:, None]
        own = rng.standard_normal((refits, len(self.weight))) / np.sqrt(self.weight)
        common = rng.standard_normal((refits, len(self.loading))) @ self.loading
        return sigma * (own + _RATIOS[k][:, None] * common)

    def of_new_runs(self, draws: int, rng: np.random.Generator) -> np.ndarray:
        """Standard deviations in nats of the error of a run of a new size, its size's share in it."""
        k = rng.choice(len(_RATIOS), draws, p=self.ratio_probability)
        return np.sqrt(
            self.scale[k] * (1 + _RATIOS[k] ** 2) * self.dof / rng.chisquare(self.dof, draws)
        )


def pooled(squares: float, free: int, seed_squares: float, seed_dof: int) -> tuple[float, int]:
    """The squares and degrees of freedom of replicate seeds, or 0 and 0 where the curves miss by more.

    `squares` are those of weighted residuals, with `free` degrees of freedom. What a setting or the law
    does to a cell is common to its seeds and not less for being repeated: noise that seeds pull
    below it makes intervals too narrow. So they are pooled unless an F-test tells them apart at 25%
    (Bancroft 1944, Annals of Mathematical Statistics 15:190).
    """
    if free < 1 or seed_dof < 1:
        return seed_squares, seed_dof
    if seed_squares > 0 and squares > 0:
        p_value = fdtrc(free, seed_dof, squares / free / (seed_squares / seed_dof))
    else:
        p_value = float(squares <= seed_squares)
    return (seed_squares, seed_dof) if p_value >= POOLED else (0.0, 0)


def absorbed_by(jacobian: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """An orthonormal basis (points, rank) of what fitted curves absorb of weighted losses."""
    whole = np.sqrt(weight)[:, None] * jacobian
    norms = np.linalg.norm(whole, axis=0)
    basis, strength, _ = np.linalg.svd(whole / np.where(norms > 0, norms, 1), full_matrices=False)
    return np.asarray(basis[:, strength > 1e-7 * strength[0]])


def likeliest(
    residual: np.ndarray,
    jacobian: np.ndarray,
    weight: np.ndarray,
    groups: Sequence[np.ndarray],
    *seeds: Any,
) -> Noise:
    """`estimate` by that of several ways to label sizes which the residuals speak for most."""
    ways = [estimate(residual, jacobian, weight, group, *seeds) for group in groups]
    return min(ways, key=lambda noise: 1.0 if noise.p_value is None else noise.p_value)


def estimate(
    residual: np.ndarray,
    jacobian: np.ndarray,
    weight: np.ndarray,
    size: np.ndarray,
    replicate_squares: float = 0.0,
    replicate_dof: int = 0,
    seed: int = 0,
) -> Noise:
    """Estimate both deviations from what the fitted curves could not absorb.

    `weight` counts the seeds behind each point, `size` labels the sizes, `replicate_squares` are
    the squared deviations between seeds, with their degrees of freedom; they count as `pooled` says.
    """
    loading = (size == np.unique(size)[:, None]).astype(float)
    root, basis = np.sqrt(weight)[:, None], absorbed_by(jacobian, weight)

    def left(columns: np.ndarray) -> np.ndarray:
        return np.asarray(columns - basis @ (basis.T @ columns))

    known, away = left(root * loading.T), left(root * residual[:, None])[:, 0]
    values, vectors = np.linalg.eigh(known.T @ known)
    # the other directions know nothing of what is shared
    moved = values > 1e-9 * max(values.max(), 1e-9)
    values, vectors = values[moved], vectors[:, moved]
    squares = (vectors.T @ (known.T @ away)) ** 2 / values
    rest, free = max(float(away @ away - squares.sum()), 0.0), len(residual) - basis.shape[1]
    replicate_squares, replicate_dof = pooled(
        rest, free - len(values), replicate_squares, replicate_dof
    )
    rest, dof = rest + replicate_squares, free + replicate_dof
    require(
        dof > 0,
        f"{len(residual)} points leave nothing to judge the noise of {basis.shape[1]} parameters by: "
        "add sizes or seeds",
    )
    others = dof - len(values)
    # all contrasts moved alike: only the sum of the two variances shows
    told = bool(len(values) and np.ptp(np.r_[values, np.zeros(others)]) > 1e-9 * values.max())
    variance = 1 + _RATIOS[:, None] ** 2 * values  # (ratios, components), in units of sigma^2

    def log_likelihood(z2: np.ndarray, rest: np.ndarray | float) -> tuple:
        scale = (np.sum(z2[..., None, :] / variance, -1) + np.asarray(rest)[..., None]) / dof
        scale = np.maximum(scale, 1e-300)
        return -0.5 * (np.log(variance).sum(-1) + dof * np.log(scale)), scale

    seen, scale = log_likelihood(squares, rest)
    best = int(np.argmax(seen))
    p_value = None
    if told:
        rng = np.random.default_rng(seed)
        drawn = (
            rng.chisquare(1, (2000, len(values))),
            rng.chisquare(others, 2000) if others else 0.0,
        )
        null, _ = log_likelihood(*drawn)
        p_value = float(np.mean(null.max(1) - null[:, 0] >= seen[best] - seen[0] - 1e-12))
    weights = np.exp(seen - seen.max()) * _prior()
    return Noise(
        independent=float(np.sqrt(scale[best])),
        shared=float(_RATIOS[best] * np.sqrt(scale[best])) if told else None,
        p_value=p_value,
        loading=loading,
        weight=weight,
        dof=dof,
        ratio_probability=weights / weights.sum(),
        scale=scale,
    )


def _prior() -> np.ndarray:
    """What is believed of the ratio before any run: 3 to 2 for none, else half-Cauchy of scale 2.

    The half-Cauchy is Gelman's for a deviation between few groups (2006, Bayesian Analysis 1:515).
    Odds and scale make 90% intervals of E cover 85% to 93%, whatever the ratio up to 2, for the
    linearised curves of the published design; evener odds cover too much where nothing is shared.
    """
    edges = np.r_[0.0, np.sqrt(_RATIOS[1:-1] * _RATIOS[2:]), _RATIOS[-1]]
    spread = np.diff(np.arctan(edges / 2))
    return np.r_[0.4, 0.6 * spread / spread.sum()]
