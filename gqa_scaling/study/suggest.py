"""Which run to do next: the one that most lowers the expected regret of the recommendation.

A belief about every configuration's curve, run or not, is held as a Gaussian around the law
L = E + exp(u_H - b_H x - p log2 n_h - q log2 n_kv), x = ln N_b centred, with u_H and b_H free to
stray from what all configurations share; where some have patterns, less r log2 density. At training
contexts other than the reference T_0 stands delta(T) + m_H log2(T / T_0) besides, m_H being how a
configuration's loss moves against the others': it is what a longer context than was trained may
change. The value of runs is how much seeing their losses would lower the expected cost of the
configuration chosen afterwards (the knowledge gradient).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gqa_scaling.config import Question, RunConfig, require
from gqa_scaling.context_sharding import density
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.ladder import REACH
from gqa_scaling.study.choices import Objective
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.points import densities
from gqa_scaling.study.proposals import Kind, Proposals, Proposed, Step
from gqa_scaling.study.results import Heads, Results, pair, pairs, pattern_of
from gqa_scaling.study.serving import Deployment, Serving
from gqa_scaling.study.shapes import family_of, shapes
from gqa_scaling.study.strays import SPREADS
from gqa_scaling.units import byte_size

STRAY_U, STRAY_B = SPREADS  # of one configuration from what all share, prior deviations
STRAY_T = 0.001  # share of the loss that m_H is an octave: 1% from 8K to 128K is 2.5 deviations
DRAWS = 1000
LEAST = 4  # finished runs, as many as the curve of one configuration needs
_CONTENDERS = 4  # configurations at most that are trained at a longer context together
_CHANCE = 0.05  # of being the cheapest somewhere, that makes a contender
Size = tuple[Heads, int, int]  # a configuration, its layers and its width
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Runs:
    """Runs done or to do, as columns: the index of their heads, and ln N_b, N_b = 8 L d^2.

    `octaves` is log2(T / T_0) of their training contexts, `length` the index of T among those other
    than T_0, -1 at T_0; None where all are at T_0.
    """

    curve: np.ndarray
    log_backbone: np.ndarray
    octaves: np.ndarray | None = None
    length: np.ndarray | None = None

    @classmethod
    def of(cls, sizes: Sequence[Size], heads: Sequence[Heads]) -> "Runs":
        """Those of these sizes at T_0, the heads of each among `heads`."""
        backbone = [float(n_formula(layers, width, 0, 0)) for _, layers, width in sizes]
        return cls(np.array([heads.index(own) for own, *_ in sizes]), np.log(backbone))

    def at(self, contexts: Sequence[int], reference: int, lengths: Sequence[int]) -> "Runs":
        """The same at these training contexts; `lengths` are all of them but the reference."""
        octaves = [np.log2(t / reference) if t and reference else 0.0 for t in contexts]
        index = [lengths.index(t) if t in lengths else -1 for t in contexts]
        return replace(self, octaves=np.array(octaves), length=np.array(index))

    def some(self, index: Sequence[int]) -> "Runs":
        i = list(index)
        rest = (None if v is None else v[i] for v in (self.octaves, self.length))
        return Runs(self.curve[i], self.log_backbone[i], *rest)


@dataclass(frozen=True)
class Suggestion:
    """Runs to do together, mostly one: their price in training FLOPs, and what they are worth.

    Regret is the expected excess cost of the configuration that would be chosen, averaged over
    the answers of the question (0.01 is 1%), before and after them; NaN for runs that a fit lacks,
    before which nothing can be chosen.
    """

    kind: Kind
    runs: tuple[Proposed, ...]
    flops: float
    regret_before: float = float("nan")
    regret_after: float = float("nan")

    @property
    def name(self) -> str:
        return self.runs[0].name

    def to_dict(self) -> dict[str, Any]:
        runs = [{k: v for k, v in vars(run).items() if k != "run"} for run in self.runs]
        own = {"kind": self.kind, "flops": self.flops, "runs": runs}
        return plain(
            runs[0] | own | {"regret_before": self.regret_before, "regret_after": self.regret_after}
        )


class Belief:
    """What runs say of every configuration's curve: a mode and a covariance (Laplace)."""

    def __init__(
        self,
        heads: Sequence[Heads],
        done: Runs,
        loss: np.ndarray,
        density: np.ndarray | None = None,
        lengths: int = 0,
    ) -> None:
        """`density` is that of each configuration in training, None where all are dense.

        `lengths` counts the training contexts, of runs done or to do, other than the reference.
        """
        self.logs = np.log2([h[:2] for h in heads])
        if density is not None:
            self.logs = np.hstack([self.logs, np.log2(density)[:, None]])
        k, m = len(heads), self.logs.shape[1]
        self.first = 3 + m  # of the u_H
        self.centre = float(done.log_backbone.mean())
        least = float(loss.min())
        # E, u, b, p, q, r, then every u_H, b_H, m_H and delta: what is believed before any run
        slopes = np.array([0.03, 0.015, 0.03])[:m]
        mean = np.r_[0.75 * least, np.log(0.25 * least), 0.2, slopes, np.zeros(3 * k + lengths)]
        spread = np.r_[0.25 * least, 0.7, 0.1, np.full(m, 0.05)]
        spread = np.r_[spread, np.full(k, STRAY_U), np.full(k, STRAY_B)]
        spread = np.r_[spread, np.full(k, STRAY_T * least), np.full(lengths, 0.25 * least)]
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
        return t[:, :1], u, t[:, 2:3] + t[:, first + k : first + 2 * k][:, curve], logs

    def _moved(self, runs: Runs) -> np.ndarray:
        """What m_H and delta add to the losses, (runs, parameters): they are linear in them."""
        out, last = np.zeros((len(runs.curve), len(self.mode))), self.first + 3 * len(self.logs)
        if runs.octaves is not None and runs.length is not None:
            i = np.arange(len(out))
            out[i, self.first + 2 * len(self.logs) + runs.curve] = runs.octaves
            away = runs.length >= 0
            out[i[away], last + runs.length[away]] = 1.0
        return out

    def loss(self, theta: np.ndarray, runs: Runs) -> np.ndarray:
        """Losses in nats (rows, runs) by rows of parameters."""
        floor, u, b, _ = self._parts(theta, runs.curve)
        curve = np.exp(np.clip(u - b * (runs.log_backbone - self.centre), -40, 10))
        return floor + curve + np.atleast_2d(theta) @ self._moved(runs).T

    def gradient(self, theta: np.ndarray, runs: Runs) -> np.ndarray:
        """Derivatives of the losses (runs, parameters)."""
        _, _, _, logs = self._parts(theta, runs.curve)
        moved, t = self._moved(runs), np.ravel(theta)
        f = self.loss(t, runs)[0] - t[0] - moved @ t
        x = runs.log_backbone - self.centre
        own = np.eye(len(self.logs))[runs.curve] * f[:, None]
        shared = np.stack([np.ones_like(f), f, -x * f, *(-logs.T * f)], 1)
        rest = moved[:, self.first + 2 * len(self.logs) :]
        return np.hstack([shared, own, -x[:, None] * own, rest])

    def imagine(self, runs: Runs, i: int) -> None:
        """As if run i had been seen and told nothing surprising: only the covariance shrinks."""
        g = self.gradient(self.mode, runs.some([i]))[0]
        along = self.covariance @ g
        self.covariance = self.covariance - np.outer(along, along) / (g @ along + self.noise**2)

    def draw(self, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
        """Rows of parameters; a covariance that shrinks a little moves the same draws a little."""
        values, vectors = np.linalg.eigh(self.covariance)
        root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
        return self.mode + rng.standard_normal((draws, len(values))) @ root

    def log_backbone_at(self, theta: np.ndarray, loss: float, octaves: float = 0.0) -> np.ndarray:
        """ln N_b at which each configuration reaches the loss (rows, configurations).

        `octaves` beyond the reference context, m_H is what the loss has moved by there.
        """
        k = len(self.logs)
        floor, u, b, _ = self._parts(theta, np.arange(k))
        moved = octaves * np.atleast_2d(theta)[:, self.first + 2 * k : self.first + 3 * k]
        excess = np.maximum(loss - floor - moved, 1e-3 * loss)  # never reached: very large
        return self.centre + (u - np.log(excess)) / np.maximum(b, 0.02)


class Decider:
    """The costs of every configuration at every answer of a question, tabulated over ln N_b.

    `heads` are the configurations that may be served (`Serving.allows`), which alone can be chosen.
    The table holds the sizes that can be built, `ladder.REACH` of those that were run. A draw whose
    size lies beyond it costs what the largest does: dear enough that no one would choose it, and
    finite, so that the mean over the draws still tells configurations apart. So does every draw of a
    configuration that holds more bytes than it may in most of them.
    """

    def __init__(
        self,
        results: Results,
        heads: Sequence[Heads],
        question: Question,
        objective: Objective = "z",
        serving: Serving | None = None,
        reference: int = 0,
    ) -> None:
        """`reference` is the training context that losses are known at, in tokens; 0 unknown."""
        require(bool(question.losses), "suggest needs target losses: name them in the question")
        serving, family = serving or Serving(), family_of(results)
        self.question, self.serving = question, serving
        self.index = [k for k, own in enumerate(heads) if serving.allows(own)]
        self.heads = tuple(heads[k] for k in self.index)
        span = np.log(n_formula(results.n_layers, results.d_model, 0, 0))
        low, high = np.log(REACH)
        self.grid = np.linspace(span.min() + low, span.max() + high, 400)
        layers, width = shapes(np.exp(self.grid), (0, 0), family.head_dim, family.ladder)
        sizes = [family.n_of(layers, width, h) for h in self.heads]
        self.log_z, self.octaves, self.fits = {}, {}, {}
        for context in question.contexts:
            self.place = place = Deployment(family, question, context, objective, serving)
            costs = [place.costs(n, h) for n, h in zip(sizes, self.heads, strict=True)]
            self.log_z[context] = np.log([place.objective_of(each) for each in costs])
            self.fits[context] = np.array([self._largest(each.bytes) for each in costs])
            further = max(context / reference, 1.0) if reference else 1.0
            self.octaves[context] = float(np.log2(further))

    def _largest(self, held: np.ndarray) -> float:
        """ln N_b of the largest size that may be served, by the bytes held over the grid."""
        if np.isinf(self.serving.limit_bytes):
            return np.inf
        rising, limit = np.log(np.maximum.accumulate(held)), np.log(self.serving.limit_bytes)
        return float(np.interp(limit, rising, self.grid, left=-np.inf))

    def costs(self, belief: Belief, theta: np.ndarray) -> list[np.ndarray]:
        """ln of the cost (rows, configurations) for every answer: target losses, then contexts."""
        out, fitting = [], False
        for loss in self.question.losses or ():
            for context, table in self.log_z.items():
                at = belief.log_backbone_at(theta, loss, self.octaves[context])[:, self.index]
                fits = np.median(at, axis=0) <= self.fits[context]
                fitting |= bool(fits.any())
                at = np.where(fits, at, self.grid[-1])
                columns = [np.interp(at[:, k], self.grid, row) for k, row in enumerate(table)]
                out.append(np.stack(columns, 1))
        require(
            fitting,
            f"nothing that reaches the target losses fits {byte_size(self.serving.limit_bytes)}, by what "
            "these runs tell: raise --fit-gib, or name higher losses",
        )
        return out

    def regret(self, costs: Sequence[np.ndarray]) -> float:
        """Expected excess cost of the best on average, mean over the answers.

        On a calibrated machine it holds the error of the clock, which no run lowers.
        """
        off = self.off(len(costs[0]))
        each = (c.mean(0).min() - (c + off - off.mean(0)).min(1).mean() for c in costs)
        return float(np.mean(list(each)))

    def off(self, draws: int) -> np.ndarray:
        """The logarithm of what costs may be off by (draws, configurations), by the clock's error."""
        factors = [self.place.off(pair(h), draws + 1) for h in self.heads]
        return np.log(np.stack([np.broadcast_to(f, draws + 1)[1:] for f in factors], 1))

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

    def gain_together(
        self, belief: Belief, theta: np.ndarray, runs: Runs, costs: Sequence, z: np.ndarray
    ) -> float:
        """How much seeing all these runs would lower the regret; `z` (draws, runs) is their noise."""
        seen = belief.loss(theta, runs)
        centred = seen - seen.mean(0) + belief.noise * (z - z.mean(0))
        cov = centred.T @ centred / len(seen)
        gain = 0.0
        for c in costs:
            slope = np.linalg.lstsq(cov, centred.T @ (c - c.mean(0)) / len(c))[0]
            gain += float(c.mean(0).min() - (c.mean(0) + centred @ slope).min(1).mean())
        return gain / len(costs)


def suggest(
    results: Results,
    grid: Sequence[RunConfig],
    question: Question,
    budget_flops: float = np.inf,
    most: int = 8,
    per_flop: bool = True,
    objective: Objective = "z",
    serving: Serving | None = None,
) -> tuple[Suggestion, ...]:
    """The runs not yet in `results` worth doing next, in that order.

    They are the rest of the grid, or, where that holds nothing new within the budget, what lies
    beyond it (`proposals`). The budget is in training FLOPs; `per_flop` prefers what lowers the
    regret most per FLOP, otherwise most per run. Raises UserError when fewer than four runs are
    finished, when their shapes are unknown, or when nothing is within the budget.
    """
    require(
        bool(results.n_layers.all()), "suggest needs the layers and widths of the finished runs"
    )
    require(
        len(results) >= LEAST,
        f"suggest needs {LEAST} finished runs to begin with, not {len(results)}",
    )
    proposals = Proposals(results, tuple(grid))
    serving = serving or Serving()
    few = f"n_kv that is a multiple of {serving.kv_multiple}"

    def affordable(steps: Sequence[Step]) -> list[Step]:
        return [s for s in steps if s.flops <= budget_flops and serving.allows(s.runs[0].heads)]

    steps, contenders = affordable(proposals.declared()), list[Heads]()
    if not steps:
        contenders = _contenders(proposals, question, objective, serving)
        further = proposals.beyond(question.contexts, contenders)
        heads = {step.runs[0].heads for step in further}
        require(
            any(map(serving.allows, heads)), f"none of {pairs(sorted(heads, key=str))} has {few}"
        )
        steps = affordable(further)
    require(
        bool(steps),
        f"no run that could tell anything costs less than {budget_flops:.3g} training FLOPs; raise "
        "--budget-flops",
    )
    belief, decider, candidates, groups = _world(proposals, steps, question, objective, serving)
    require(
        len(decider.heads) > 1 or len(belief.logs) == 1,
        f"only {pairs(decider.heads)} has {few}: there is nothing to choose between, and no run tells",
    )
    flops = np.array([step.flops for step in steps])
    single = np.array([len(group) == 1 for group in groups])
    first = np.array([group[0] for group in groups])
    left, free = budget_flops, np.ones(len(steps), bool)
    out: list[Suggestion] = []
    while len(out) < most and (free & (flops <= left)).any():
        rng = np.random.default_rng(0)  # the same draws for every step, so that regrets compare
        theta = belief.draw(rng)
        costs = decider.costs(belief, theta)
        gains = decider.gains(belief, theta, candidates, costs)[first]
        for i in np.flatnonzero(~single & free).tolist():
            own, z = candidates.some(groups[i]), rng.standard_normal((len(theta), len(groups[i])))
            gains[i] = decider.gain_together(belief, theta, own, costs, z)
        score = np.where(free & (flops <= left), gains / (flops if per_flop else 1.0), -np.inf)
        i = int(np.argmax(score))
        before = decider.regret(costs)
        for j in groups[i]:
            belief.imagine(candidates, j)
        after = max(before - float(gains[i]), 0.0)
        out.append(Suggestion(steps[i].kind, steps[i].runs, float(flops[i]), before, after))
        free[i], left = False, left - flops[i]
    return tuple(out)


def _world(
    proposals: Proposals,
    steps: Sequence[Step],
    question: Question,
    objective: Objective,
    serving: Serving,
) -> tuple[Belief, Decider, Runs, list[list[int]]]:
    """What is believed and decided, every run of the steps, and which of them are each step's."""
    r, reference = proposals.results, proposals.reference
    todo = [run for step in steps for run in step.runs]
    ends = np.cumsum([len(step.runs) for step in steps]).tolist()
    groups = [list(range(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    done: list[Size] = list(zip(r.heads, r.n_layers.tolist(), r.d_model.tolist(), strict=True))
    sizes: list[Size] = [(run.heads, run.n_layers, run.d_model) for run in todo]
    heads = sorted({own for own, *_ in (*done, *sizes)}, key=str)
    trained = r.context_length.tolist()
    planned = [run.context for run in todo]
    lengths = sorted({*trained, *planned} - {reference})
    share = None
    if any(map(pattern_of, heads)):
        computed = [_density(run) for run in todo]
        share = densities(np.r_[r.density, computed], Runs.of([*done, *sizes], heads).curve)
    runs = Runs.of(done, heads).at(trained, reference, lengths)
    belief = Belief(heads, runs, r.loss, share, len(lengths))
    decider = Decider(r, heads, question, objective, serving, reference)
    return belief, decider, Runs.of(sizes, heads).at(planned, reference, lengths), groups


def _density(run: Proposed) -> float:
    pattern = pattern_of(run.heads)
    if pattern is None:
        return 1.0
    return density(pattern.layers(run.n_layers, run.heads[1]), run.context)


def _contenders(
    proposals: Proposals, question: Question, objective: Objective, serving: Serving
) -> list[Heads]:
    """The configurations, of those that were run, which may be the cheapest of some answer."""
    if sum(map(serving.allows, proposals.heads)) < 2:
        return []
    done = [Proposed("", h, L, d, t, 0, 0.0, 0.0) for h, L, d, t in proposals.seeds]
    here = [Step("seed", (run,)) for run in done]  # as if they were to do
    belief, decider, *_ = _world(proposals, here, question, objective, serving)
    costs = decider.costs(belief, belief.draw(np.random.default_rng(0)))
    heads = decider.heads
    chance = np.mean(
        [np.bincount(c.argmin(1), minlength=len(heads)) / len(c) for c in costs], axis=0
    )
    order = np.argsort(-chance, kind="stable")
    likely = [i for i in order[:_CONTENDERS] if chance[i] >= _CHANCE]
    return [heads[i] for i in (likely if len(likely) > 1 else order[:2])]
