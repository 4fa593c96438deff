"""Which run to do next: the one that most lowers the expected regret of the recommendation.

A belief about every configuration's curve, run or not, is held as a Gaussian around the law
L = E + exp(u_H - b_H x - p log2 n_h - q log2 n_kv), x = ln N_b centred, with u_H and b_H free to
stray from what all configurations share; where some have patterns, less r log2 density. The value
of a run is how much seeing its loss would lower the expected cost of the configuration chosen
afterwards (the knowledge gradient).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import Question, RunConfig, require
from gqa_scaling.context_sharding import density
from gqa_scaling.costs import n_formula, training_flops
from gqa_scaling.experiment.ladder import REACH
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.points import densities
from gqa_scaling.study.results import Heads, Results, heads_of, pattern_of
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import family_of, shapes

STRAY_U, STRAY_B = 0.02, 0.01  # of one configuration from what all share, prior deviations
DRAWS = 1000
Size = tuple[Heads, int, int]  # a configuration, its layers and its width
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Runs:
    """Runs done or to do, as columns: the index of their heads, and ln N_b, N_b = 8 L d^2."""

    curve: np.ndarray
    log_backbone: np.ndarray

    @classmethod
    def of(cls, sizes: Sequence[Size], heads: Sequence[Heads]) -> "Runs":
        """Those of these sizes, the heads of each among `heads`."""
        backbone = [float(n_formula(layers, width, 0, 0)) for _, layers, width in sizes]
        return cls(np.array([heads.index(own) for own, *_ in sizes]), np.log(backbone))


@dataclass(frozen=True)
class Suggestion:
    """One run: its price in training FLOPs, and the expected regret before and after it.

    Regret is the expected excess cost of the configuration that would be chosen, averaged over
    the answers of the question (0.01 is 1%).
    """

    name: str
    heads: Heads
    n_layers: int
    d_model: int
    flops: float
    regret_before: float
    regret_after: float

    def to_dict(self) -> dict[str, Any]:
        return plain(asdict(self))


class Belief:
    """What runs say of every configuration's curve: a mode and a covariance (Laplace)."""

    def __init__(
        self,
        heads: Sequence[Heads],
        done: Runs,
        loss: np.ndarray,
        density: np.ndarray | None = None,
    ) -> None:
        """`density` is that of each configuration in training, None where all are dense."""
        self.logs = np.log2([h[:2] for h in heads])
        if density is not None:
            self.logs = np.hstack([self.logs, np.log2(density)[:, None]])
        k, m = len(heads), self.logs.shape[1]
        self.first = 3 + m  # of the u_H
        self.centre = float(done.log_backbone.mean())
        least = float(loss.min())
        # E, u, b, p, q, r, then every u_H and b_H: what is believed before any run
        slopes = np.array([0.03, 0.015, 0.03])[:m]
        mean = np.r_[0.75 * least, np.log(0.25 * least), 0.2, slopes, np.zeros(2 * k)]
        spread = np.r_[0.25 * least, 0.7, 0.1, np.full(m, 0.05)]
        spread = np.r_[spread, np.full(k, STRAY_U), np.full(k, STRAY_B)]
        self.mode, self.noise = mean, 0.003 * least
        from scipy.optimize import least_squares  # slow to load, and reports load this module

        for _ in range(3):  # the noise and the mode settle together

            def residuals(t: np.ndarray, noise: float = self.noise) -> np.ndarray:
                return np.r_[(self.loss(t, done)[0] - loss) / noise, (t - mean) / spread]

            def jacobian(t: np.ndarray, noise: float = self.noise) -> np.ndarray:
                return np.vstack([self.gradient(t, done) / noise, np.diag(1 / spread)])

            self.mode = least_squares(residuals, self.mode, jac=jacobian, x_scale="jac").x
            J = jacobian(self.mode)
            self.covariance = np.linalg.inv(J.T @ J)
            used = np.einsum("ij,jk,ik->", J[: len(loss)], self.covariance, J[: len(loss)])
            left = loss - self.loss(self.mode, done)[0]
            # a little prior weight keeps a lucky first few runs from claiming no noise at all
            squares = (left**2).sum() + 4 * (0.002 * least) ** 2
            self.noise = float(np.sqrt(squares / (max(len(loss) - used, 0.0) + 4)))

    def _parts(self, theta: np.ndarray, curve: np.ndarray) -> tuple:
        t, k, first = np.atleast_2d(theta), len(self.logs), self.first
        logs, u = self.logs[curve], t[:, 1:2]
        for i in range(3, first):
            u = u - t[:, i : i + 1] * logs[:, i - 3]
        u = u + t[:, first : first + k][:, curve]
        return t[:, :1], u, t[:, 2:3] + t[:, first + k :][:, curve], logs

    def loss(self, theta: np.ndarray, runs: Runs) -> np.ndarray:
        """Losses in nats (rows, runs) by rows of parameters."""
        floor, u, b, _ = self._parts(theta, runs.curve)
        return floor + np.exp(np.clip(u - b * (runs.log_backbone - self.centre), -40, 10))

    def gradient(self, theta: np.ndarray, runs: Runs) -> np.ndarray:
        """Derivatives of the losses (runs, parameters)."""
        floor, _, _, logs = self._parts(theta, runs.curve)
        f = (self.loss(theta, runs) - floor)[0]
        x = runs.log_backbone - self.centre
        own = np.eye(len(self.logs))[runs.curve] * f[:, None]
        shared = np.stack([np.ones_like(f), f, -x * f, *(-logs.T * f)], 1)
        return np.hstack([shared, own, -x[:, None] * own])

    def imagine(self, runs: Runs, i: int) -> None:
        """As if run i had been seen and told nothing surprising: only the covariance shrinks."""
        g = self.gradient(self.mode, Runs(runs.curve[[i]], runs.log_backbone[[i]]))[0]
        along = self.covariance @ g
        self.covariance = self.covariance - np.outer(along, along) / (g @ along + self.noise**2)

    def draw(self, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
        values, vectors = np.linalg.eigh(self.covariance)
        scaled = vectors * np.sqrt(np.maximum(values, 0))
        return self.mode + rng.standard_normal((draws, len(values))) @ scaled.T

    def log_backbone_at(self, theta: np.ndarray, loss: float) -> np.ndarray:
        """ln N_b at which each configuration reaches the loss (rows, configurations)."""
        floor, u, b, _ = self._parts(theta, np.arange(len(self.logs)))
        excess = np.maximum(loss - floor, 1e-3 * loss)  # a floor above the target: very large
        return self.centre + (u - np.log(excess)) / np.maximum(b, 0.02)


class Decider:
    """The costs of every configuration at every answer of a question, tabulated over ln N_b.

    The table holds the sizes that can be built, `ladder.REACH` of those that were run. A draw whose
    size lies beyond it costs what the largest does: dear enough that no one would choose it, and
    finite, so that the mean over the draws still tells configurations apart.
    """

    def __init__(self, results: Results, heads: Sequence[Heads], question: Question) -> None:
        require(bool(question.losses), "suggest needs target losses: name them in the question")
        self.question, family = question, family_of(results)
        span = np.log(n_formula(results.n_layers, results.d_model, 0, 0))
        low, high = np.log(REACH)
        self.grid = np.linspace(span.min() + low, span.max() + high, 400)
        layers, width = shapes(np.exp(self.grid), (0, 0), family.head_dim, family.ladder)
        sizes = [family.from_formula(family.formula(layers, width, h), h) for h in heads]
        self.log_z = {}
        for context in question.contexts:
            place = Deployment(family, question, context)
            z = [place.costs(n, h).z for n, h in zip(sizes, heads, strict=True)]
            self.log_z[context] = np.log(z)

    def costs(self, belief: Belief, theta: np.ndarray) -> list[np.ndarray]:
        """ln Z (rows, configurations) for every answer: target losses, then contexts."""
        out = []
        for loss in self.question.losses or ():
            at = belief.log_backbone_at(theta, loss)
            for table in self.log_z.values():
                columns = [np.interp(at[:, k], self.grid, row) for k, row in enumerate(table)]
                out.append(np.stack(columns, 1))
        return out

    def regret(self, costs: Sequence[np.ndarray]) -> float:
        """Expected excess cost of the best on average, mean over the answers."""
        return float(np.mean([c.mean(0).min() - c.min(1).mean() for c in costs]))

    def gains(self, belief: Belief, theta: np.ndarray, runs: Runs, costs: Sequence) -> np.ndarray:
        """How much seeing each run would lower the regret, mean over the answers."""
        seen = belief.loss(theta, runs)
        centred = seen - seen.mean(0)
        deviation = np.sqrt(centred.var(0) + belief.noise**2)
        gain = np.zeros(seen.shape[1])
        for c in costs:
            slope = centred.T @ (c - c.mean(0)) / len(c) / deviation[:, None]  # (runs, heads)
            after = c.mean(0)[None, :, None] + slope[:, :, None] * _NODES
            gain += c.mean(0).min() - after.min(1) @ _WEIGHTS
        return gain / len(costs)


def suggest(
    results: Results,
    grid: Sequence[RunConfig],
    question: Question,
    budget_flops: float = np.inf,
    most: int = 8,
    per_flop: bool = True,
    seed: int = 0,
) -> tuple[Suggestion, ...]:
    """The runs of `grid` not yet in `results` worth doing next, in that order.

    The budget is in training FLOPs; `per_flop` prefers what lowers the regret most per FLOP,
    otherwise most per run. Raises UserError when fewer than six runs are finished, when their
    shapes are unknown, or when the grid holds nothing new within the budget.
    """
    require(
        bool(results.n_layers.all()), "suggest needs the layers and widths of the finished runs"
    )
    require(len(results) >= 6, f"suggest needs six finished runs to begin with, not {len(results)}")
    done = list(
        zip(results.heads, results.n_layers.tolist(), results.d_model.tolist(), strict=True)
    )
    todo: dict[Size, RunConfig] = {}
    for run in grid:
        m = run.model
        size = heads_of(m.n_heads, m.n_kv_heads, m.pattern), m.n_layers, m.d_model
        if size not in done:
            todo.setdefault(size, run)
    sizes, flops = list(todo), np.array([float(training_flops(run)) for run in todo.values()])
    require(
        bool((flops <= budget_flops).any()),
        f"the grid holds no new size or configuration within {budget_flops:.3g} training FLOPs",
    )
    heads = sorted({own for own, *_ in (*done, *sizes)})
    computed = [density(run.model.layer_patterns, run.context_length) for run in todo.values()]
    share = densities(np.r_[results.density, computed], Runs.of([*done, *sizes], heads).curve)
    sparse = any(map(pattern_of, heads))
    belief = Belief(heads, Runs.of(done, heads), results.loss, share if sparse else None)
    candidates, decider = Runs.of(sizes, heads), Decider(results, heads, question)
    rng, left, free = np.random.default_rng(seed), budget_flops, np.ones(len(todo), bool)
    out: list[Suggestion] = []
    while len(out) < most and (free & (flops <= left)).any():
        theta = belief.draw(rng)
        costs = decider.costs(belief, theta)
        gains = decider.gains(belief, theta, candidates, costs)
        score = np.where(free & (flops <= left), gains / (flops if per_flop else 1.0), -np.inf)
        i = int(np.argmax(score))
        before = decider.regret(costs)
        belief.imagine(candidates, i)
        after = max(before - float(gains[i]), 0.0)
        out.append(Suggestion(todo[sizes[i]].name, *sizes[i], flops[i], before, after))
        free[i], left = False, left - flops[i]
    return tuple(out)
