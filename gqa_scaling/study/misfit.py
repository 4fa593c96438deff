"""Whether the curves bend otherwise than the law says, and what bend these runs would show.

Extrapolation and E rest on the law being exactly a power of size above a floor. Two tests of that:
a further term c ln N, which stands for any smooth bend, and, where there are replicate seeds, the
curves' misses against the noise between seeds. A test that finds nothing says little unless it
would have found something, so both come with their power.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import fdtrc, fdtri, ncfdtrinc

from gqa_scaling.study.models import Model
from gqa_scaling.study.noise import absorbed_by, likeliest
from gqa_scaling.study.points import Points
from gqa_scaling.study.solver import Solution

SUSPICIOUS = 0.05  # p-value below which something is said to be there
POWER = 0.8  # how often a bend of the size that is printed would be found
BEND = 0.1  # nats for each factor of e in N: a term c ln N of this size should not go unseen
ROUNDED = 1e-7  # nats: replicate seeds that differ by no more end in the same loss
_DRAWS = 4000

Verdict = Literal["bends", "misses", "unseen", "untested", "none"]


@dataclass(frozen=True)
class Misfit:
    """What the two tests say.

    `bend` is the least-squares c of a further term c ln N (of N_b in a joint law), in nats for each
    factor of e, `p_value` its probability without one, given independent errors and errors shared
    by a size. `found` is the c that would be found 80% of the time, and `found_rms` what it leaves
    between losses and curves, in nats (root mean square). None where the runs cannot tell c at all.
    `replicate_p_value` and `replicate_found` are those of the F-test against seeds, the latter a
    root mean square in nats; None without seeds.
    """

    bend: float | None = None
    p_value: float | None = None
    found: float | None = None
    found_rms: float | None = None
    replicate_p_value: float | None = None
    replicate_found: float | None = None

    @property
    def verdict(self) -> Verdict:
        """The curves bend, miss their runs, may bend unseen, cannot be tested, or none of these."""
        if self.p_value is not None and self.p_value < SUSPICIOUS:
            return "bends"
        if self.replicate_p_value is not None and self.replicate_p_value < SUSPICIOUS:
            return "misses"
        if self.found is None:
            return "untested"
        return "unseen" if self.found > BEND else "none"

    @property
    def flag(self) -> str:
        """What must be known of it, in words; "" where a bend would have been found and was not."""
        rest = "E and losses beyond the sizes that were trained rest on the law alone"
        return {
            "bends": f"the curves bend otherwise than the law: a further {self.bend or 0:+.2f} ln N "
            f"(p = {self.p_value or 0:.3f}); do not trust E, nor losses beyond the trained sizes",
            "misses": "the curves miss the runs by more than seeds differ "
            f"(p = {self.replicate_p_value or 0:.3f}): the law, or settings that differ by run",
            "unseen": f"a further {BEND:g} ln N would mostly go unseen (these runs show {self.found or 0:.2g}"
            f" ln N in {POWER:.0%} of cases): {rest}; a smaller and a larger size tell the most",
            "untested": f"the sizes are too few to test the law: {rest}",
            "none": "",
        }[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def misfit(
    p: Points,
    model: Model,
    best: Solution,
    residual: np.ndarray,
    groups: Sequence[np.ndarray],
    seed: int,
) -> Misfit:
    """Test the residuals (points,), in nats, of a fitted law; `groups` as in `fit.fit_model`.

    The further term is that of the linearised law (Rao's score test), its noise estimated with the
    term fitted too, so that a bend does not pass for errors that sizes share.
    """
    w, seeds = p.replicates.astype(float), p.noise_dof * (p.noise or 0.0) ** 2
    root, basis = np.sqrt(w), absorbed_by(best.absorbing, w)
    log_n = root * (model.x + model.centre[model.curve])
    new = log_n - basis @ (basis.T @ log_n)
    length, free = float(np.linalg.norm(new)), len(w) - basis.shape[1]
    against = _against_seeds(p, float((w * residual**2).sum()), free)
    if free + p.noise_dof < 2 or length < 1e-6 * np.linalg.norm(log_n - log_n.mean()):
        return Misfit(**against)
    along = new / length
    column = (new / root)[:, None]
    left = residual - column[:, 0] * float(along @ (root * residual)) / length
    more = np.hstack([best.absorbing, column])
    noise = likeliest(left, more, w, groups, seeds, p.noise_dof, seed)
    chance = np.abs((root * noise.draw(_DRAWS, np.random.default_rng(seed))) @ along)
    seen = float(along @ (root * residual))
    # what lies this far beyond the limit is below it in one case of five
    found = float(np.quantile(chance, 1 - SUSPICIOUS) + np.quantile(chance, 2 * POWER - 1))
    return Misfit(
        bend=seen / length,
        p_value=float(np.mean(chance >= abs(seen))),
        found=found / length,
        found_rms=found / float(np.sqrt(w.sum())),
        **against,
    )


def _against_seeds(p: Points, squares: float, free: int) -> dict[str, float]:
    """The F-test of the curves' misses against the noise between replicate seeds."""
    if p.noise is None or free < 1:
        return {}
    noise = max(p.noise, ROUNDED)  # seeds that all agree leave every miss to the curves
    ratio = squares / free / noise**2
    limit = fdtri(free, p.noise_dof, 1 - SUSPICIOUS)
    more = ncfdtrinc(free, p.noise_dof, 1 - POWER, limit)  # noncentrality
    return {
        "replicate_p_value": float(fdtrc(free, p.noise_dof, ratio)),
        "replicate_found": float(noise * np.sqrt(more / p.replicates.sum())),
    }
