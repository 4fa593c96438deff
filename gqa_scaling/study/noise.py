"""How far runs stray from their curves: independent noise, and errors that a size's runs share.

One learning rate for all models of a size makes such shared errors: curves fitted to them lean
together, and a bootstrap of independent residuals would call the floor E surer than it is.
"""

from dataclasses import dataclass

import numpy as np

_RATIOS = np.r_[0.0, np.geomspace(0.02, 6.0, 60)]  # of the shared to the independent deviation
_NOTHING_SHARED = 0.35  # probability of ratio 0 before any run; with it intervals cover as named


@dataclass(frozen=True)
class Noise:
    """Restricted likelihood of two variance components, given residuals and a Jacobian.

    `independent` and `shared` are the most likely standard deviations in nats of one run and of
    one size; `p_value` is that of a likelihood ratio as large as seen when nothing is shared.
    """

    independent: float
    shared: float
    p_value: float
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
    the squared deviations between seeds, with their degrees of freedom.
    """
    root = np.sqrt(weight)
    loading = (size == np.unique(size)[:, None]).astype(float)
    norms = np.linalg.norm(root[:, None] * jacobian, axis=0)
    q, _ = np.linalg.qr(root[:, None] * jacobian / np.where(norms > 0, norms, 1), mode="complete")
    free = q[:, jacobian.shape[1] :].T
    known = free @ (root[:, None] * loading.T)
    values, vectors = np.linalg.eigh(known @ known.T)
    squares = (vectors.T @ (free @ (root * residual))) ** 2
    dof = len(values) + replicate_dof
    moved = values > 1e-9 * max(values.max(), 1e-9)  # the others know nothing of what is shared
    rest, values = squares[~moved].sum() + replicate_squares, values[moved]
    variance = 1 + _RATIOS[:, None] ** 2 * values  # (ratios, components), in units of sigma^2

    def log_likelihood(z2: np.ndarray, rest: np.ndarray | float) -> tuple:
        scale = (np.sum(z2[..., None, :] / variance, -1) + np.asarray(rest)[..., None]) / dof
        scale = np.maximum(scale, 1e-300)
        return -0.5 * (np.log(variance).sum(-1) + dof * np.log(scale)), scale

    seen, scale = log_likelihood(squares[moved], rest)
    best = int(np.argmax(seen))
    rng = np.random.default_rng(seed)
    null, _ = log_likelihood(
        rng.chisquare(1, (2000, len(values))),
        rng.chisquare(max(dof - len(values), 1), 2000),
    )
    ratio = null.max(1) - null[:, 0]
    weights = np.exp(seen - seen.max()) * _prior()
    return Noise(
        independent=float(np.sqrt(scale[best])),
        shared=float(_RATIOS[best] * np.sqrt(scale[best])),
        p_value=float(np.mean(ratio >= seen[best] - seen[0] - 1e-12)),
        loading=loading,
        weight=weight,
        dof=dof,
        ratio_probability=weights / weights.sum(),
        scale=scale,
    )


def _prior() -> np.ndarray:
    """What is believed of the ratio before any run: nothing shared, or a half-Cauchy spread."""
    edges = np.r_[0.0, np.sqrt(_RATIOS[1:-1] * _RATIOS[2:]), _RATIOS[-1]]
    spread = np.diff(np.arctan(edges))
    return np.r_[_NOTHING_SHARED, (1 - _NOTHING_SHARED) * spread / spread.sum()]
