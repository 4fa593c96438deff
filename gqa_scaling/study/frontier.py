"""The cost-optimal configuration for a target loss and a context length, and how sure it is.

For every head configuration H the law is inverted to N*(H), a real-valued (L, d) follows from the
study's own ladder, and the costs from `costs` (Chen et al. 2025, section 4.1, step 3). Repeating
this over the bootstrap draws, all configurations sharing each draw, gives the probability that a
configuration is the cheapest and what choosing it would cost on average.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from scipy.special import ndtri

from gqa_scaling import context_sharding
from gqa_scaling.config import (
    MOST_HEADS,
    MOST_LAYERS,
    ModelConfig,
    Question,
    UserError,
    between,
    require,
    round_up,
)
from gqa_scaling.costs import (
    HardwareCost,
    inference_flops,
    inference_memory,
    kv_cache_values,
    n_exact,
    n_formula,
    parameters,
)
from gqa_scaling.experiment.ladder import (
    MOST_PARAMETERS,
    REACH,
    nearest_buildable,
)
from gqa_scaling.hardware import Hardware
from gqa_scaling.study import laws
from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.fit import LEVEL, Fit, Interval, interval, plain
from gqa_scaling.study.models import Curves
from gqa_scaling.study.results import Heads, Results, heads_of, pair, pattern_of
from gqa_scaling.study.shapes import effective_context, shapes
from gqa_scaling.units import quantity

MISSED = 0.05  # a larger share of refits that never reach the loss is said so
Load = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # N to costs and shares held
_STEPS = 60  # most of a search for an equal cost, which takes six or so
_ROUNDING = 1e-12  # costs this much apart, relative, are one cost: rounding leaves about 1e-15


@dataclass(frozen=True)
class Serving:
    """How the model is served, for costs in bytes, seconds and dollars, and what must hold.

    `batch` sequences share one copy of the weights. What is held are all weights, embeddings
    included, and the KV caches. Decoding one token of each takes the longer of reading the bytes
    of N (without embeddings) and the caches at the hardware's bandwidth and computing at its peak
    times its MFU. `limit_bytes`, of what is held, and `kv_multiple` rule configurations out.
    """

    batch: int = 1
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0
    hardware: Hardware | None = None
    limit_bytes: float = math.inf
    kv_multiple: int = 1

    def __post_init__(self) -> None:
        between("batch", self.batch, 1, 1e9, "sequences")
        between("kv_multiple", self.kv_multiple, 1, MOST_HEADS)
        for name in ("weight_bytes", "cache_bytes"):
            between(name, getattr(self, name), 0.01, 100)
        require(self.limit_bytes > 0, f"limit_bytes={self.limit_bytes} must be greater than 0")
        if self.hardware is not None:
            between("price", self.hardware.price, 0, 1e6, "dollars an hour")

    def sizes(self) -> str:
        """The batch and the bytes of weights and cached values, in words."""
        return (
            f"batch {self.batch}, {self.weight_bytes:g} bytes a weight, "
            f"{self.cache_bytes:g} a cached value"
        )

    def describe(self) -> str:
        """In words, for what is printed."""
        where = f" on {self.hardware.name}" if self.hardware else ""
        limit = f", at most {self.limit_bytes:.4g} bytes" if math.isfinite(self.limit_bytes) else ""
        many = f", n_kv a multiple of {self.kv_multiple}" if self.kv_multiple > 1 else ""
        return f"{self.sizes()}{where}{limit}{many}"


@dataclass(frozen=True)
class Costs:
    """Memory in values, FLOPs in the named convention, Z; memory and FLOPs also without context.

    `bytes` held (embeddings included), `seconds` per decoded token and `dollars` per million of
    them are those of `Serving`; the last two are NaN when it names no hardware.
    """

    memory: Any
    flops: Any
    z: Any
    memory_fixed: Any
    flops_fixed: Any
    bytes: Any
    seconds: Any
    dollars: Any


@dataclass(frozen=True)
class Model:
    """A model that can be built, nearest to a real-valued N*.

    `n` is counted as the fit counts, `loss` is the fitted curve there, in nats, with the intervals
    of the curve and of one run around it; `parameters` is the whole built model. Memory is in
    values; bytes are of the weights (embeddings included) and the whole batch's KV caches as they are
    allocated (`context_sharding.kv_cache_values`), at the bytes a value that `Serving` says. `command` trains it, "" where the runs come without a
    corpus; `trained` names the run of the study that it is, "" for a new one.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    n: float
    n_exact: int
    parameters: int
    loss: float
    loss_interval: Interval
    run_interval: Interval
    memory: float
    flops: float
    z: float
    weight_bytes: float
    cache_bytes: float
    config: ModelConfig
    command: str = ""
    trained: str = ""

    @property
    def heads(self) -> Heads:
        return heads_of(self.n_heads, self.n_kv_heads, self.config.pattern)


@dataclass(frozen=True)
class EqualCost:
    """What a configuration reaches for what the baseline costs at the target loss.

    `n` is the largest size within reach of the study that costs no more, by the objective, and holds
    what must hold, `loss` the curve there, in nats. `gain` is the baseline's loss minus `loss`, the baseline too at its
    largest size of that cost: its N*, except where a ladder that turns wider at once makes a
    larger model no dearer. In each refit the cost is that of its own N*, as for the savings. NaN
    where the baseline has none, or where no size is as cheap.
    """

    n: float
    n_interval: Interval
    loss: float
    gain: float
    gain_interval: Interval
    extrapolated: bool


@dataclass(frozen=True)
class Choice:
    """One configuration at one (loss, context).

    `effective` is T_eff, the keys that a head reads and keeps at the context, all of it when dense;
    `cost` is the objective, `excess` how much dearer than the cheapest (0.02 is 2%), `regret` the
    expected excess over the draws (infinite when some draw reaches the loss only with another),
    `probability` that of being cheapest, both over the draws in which something reaches the loss;
    `unreachable` the share of draws in which no N within reach of the study (`Scale.reach`) reaches
    it within what must hold: N* and costs are infinite there, and in the intervals. Savings are
    1 - cost / baseline's, of memory, FLOPs and Z, with intervals over the draws; NaN where the
    baseline never reaches the loss.
    """

    heads: Heads
    n: float
    n_interval: Interval
    n_layers: float
    d_model: float
    memory: float
    memory_fixed: float
    flops: float
    flops_fixed: float
    z: float
    effective: float
    cost: float
    excess: float
    probability: float
    regret: float
    unreachable: float
    extrapolated: bool
    bytes: float
    saving: dict[str, float]
    saving_interval: dict[str, Interval]
    equal_cost: EqualCost

    @property
    def reached(self) -> bool:
        """Whether some size that can be built reaches the loss within what must hold."""
        return math.isfinite(self.cost)


@dataclass(frozen=True)
class Answer:
    """All configurations for one target loss (nats) and context (tokens), cheapest first.

    `tied` are the best and those needed to hold 90% of the probability of being cheapest;
    `margin` is how much dearer the runner-up is, `baseline_unreachable` the share of draws in
    which the baseline never reaches the loss. `model` is None where none can be built that fits.
    """

    loss: float
    context: int
    choices: tuple[Choice, ...]
    tied: tuple[Heads, ...]
    margin: float
    baseline_unreachable: float
    model: Model | None

    @property
    def best(self) -> Choice:
        return self.choices[0]

    @property
    def lowest(self) -> Choice | None:
        """The configuration of least loss at the baseline's cost; None where there is none."""
        known = [c for c in self.choices if math.isfinite(c.equal_cost.gain)]
        return max(known, key=lambda c: c.equal_cost.gain, default=None)

    def choice(self, heads: Heads) -> Choice:
        return next(c for c in self.choices if c.heads == heads)


@dataclass(frozen=True)
class Check:
    """A run that the fit has not seen: its loss in nats, and what the curve had predicted.

    `run_interval` is where the loss of one run is expected, at 90%.
    """

    name: str
    heads: Heads
    n_layers: int
    d_model: int
    n: float
    predicted: float
    run_interval: Interval
    measured: float

    @property
    def difference(self) -> float:
        """Measured minus predicted, in nats."""
        return self.measured - self.predicted


@dataclass(frozen=True)
class Frontier:
    """The answers to a question, losses in the order given, contexts within each.

    `doubt` says in a few words why the fit behind them cannot carry an answer; "" when it can.
    `checks` are runs trained as the study's own but left out of its fit. Losses are those at the
    training context `train_context`, in tokens; 0 where it is unknown.
    """

    source: str
    count: str
    train_context: int
    question: Question
    objective: Objective
    serving: Serving
    baseline: Heads
    losses: tuple[float, ...]
    answers: tuple[Answer, ...]
    intervals: str
    flags: tuple[str, ...]
    doubt: str
    checks: tuple[Check, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether some configuration has a pattern."""
        return any(pattern_of(c.heads) for c in self.answers[0].choices)

    @property
    def headline(self) -> Answer:
        """The answer that is told first: the longest context, the middle target loss."""
        return self.at(sorted(self.losses)[len(self.losses) // 2], max(self.question.contexts))

    @property
    def units(self) -> dict[str, str]:
        """The unit of every kind of number here."""
        return units(self.question, self.serving, self.sharded)

    def at(self, loss: float, context: int) -> Answer:
        return next(a for a in self.answers if a.loss == loss and a.context == context)

    def to_dict(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        out["units"] = self.units
        for answer, whole in zip(out["answers"], self.answers, strict=True):
            answer["best"] = whole.best.heads
            answer["lowest"] = whole.lowest and whole.lowest.heads
        for row, check in zip(out["checks"], self.checks, strict=True):
            row["difference"] = check.difference
        return plain(out)


def units(
    question: Question, serving: Serving | None = None, sharded: bool = False
) -> dict[str, str]:
    """The unit of every kind of number in a frontier; `sharded` where a configuration is."""
    flops = {
        "per_token": "FLOPs of one token at the context, per_token: 2 N + 4 T L d_h n_h",
        "per_sequence": "FLOPs as plotted by the paper, per_sequence: T (N + 2 T L d_h n_h)",
    }[question.convention]
    q, s = question, serving or Serving()
    effective = (
        "tokens: the keys that a head reads and keeps at the context, a mean over layers and KV heads; "
        "for a configuration with a pattern it stands for T in T L d_h n_kv and T L d_h n_h"
    )
    return {
        **({"effective": effective} if sharded else {}),
        "loss": "nats per token",
        "context": "tokens",
        "n": "parameters without embeddings",
        "memory": "values: N + 2 T L d_h n_kv",
        "flops": flops,
        "z": f"{q.weight:g} memory^{q.memory_power:.3g} + {1 - q.weight:.3g} flops^{q.compute_power:.3g}",
        "bytes": f"bytes held, embeddings included: {s.sizes()}",
        "weight_bytes": f"bytes of the built model, embeddings included: {s.weight_bytes:g} a weight",
        "cache_bytes": f"bytes of {s.batch} KV caches: {s.cache_bytes:g} a value",
        "seconds": "per decoded token",
        "dollars": "per million decoded tokens",
        "saving": "1 - cost / baseline's cost",
        "gain": "nats: baseline's loss minus the configuration's, at the largest sizes of that cost",
    }


# ------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Scale:
    """What turns the fit's N into shapes: the study's ladder, head size and way of counting.

    `ratios` holds, for each head configuration, ln N of its runs and the ratio of `n_formula` to
    the fit's own count there: 1 for published points, a little less for built models, whose FFN
    is rounded up. Under None are all runs together, for configurations without runs. `template`
    is the architecture that shapes are put into, `trained` the least and the largest N of all runs.
    """

    ladder: tuple[tuple[int, int], ...]
    head_dim: int
    template: ModelConfig
    ratios: dict[Heads | None, tuple[np.ndarray, np.ndarray]]
    count: str
    trained: Interval

    def to_formula(self, n: np.ndarray | float, heads: Heads | None = None) -> np.ndarray:
        """`n_formula` of a model that the fit counts as n."""
        log_n, formula = self.ratios.get(heads, self.ratios[None])
        return n * np.interp(np.log(np.where(np.isfinite(n), n, 1.0)), log_n, formula)

    def from_formula(self, n: np.ndarray, heads: Heads | None = None) -> np.ndarray:
        """The fit's own count of a model whose `n_formula` is n."""
        log_n, formula = self.ratios.get(heads, self.ratios[None])
        return n / np.interp(np.log(n), log_n + np.log(formula), formula)

    def reach(self, heads: Heads) -> Interval:
        """The least and the largest N of a configuration that this study takes for one to build.

        They are `ladder.REACH` times the least and the largest N trained. The largest has at most
        MOST_PARAMETERS, and at most MOST_LAYERS layers at the aspect ratio of the largest size.
        """
        largest = max(self.ladder, key=lambda s: n_formula(*s, *heads[:2], self.head_dim))
        width = MOST_LAYERS * largest[1] / largest[0]
        deepest = n_formula(float(MOST_LAYERS), width, *heads[:2], self.head_dim)
        high = min(REACH[1] * self.trained[1], MOST_PARAMETERS)
        high = min(high, float(self.from_formula(np.array(deepest), heads)))
        return REACH[0] * self.trained[0], max(high, self.trained[1])

    def within(self, n: np.ndarray, heads: Heads) -> np.ndarray:
        """N*, infinite where it lies beyond reach; below reach the least size there, as it does too."""
        low, high = self.reach(heads)
        return np.where(n > high, np.inf, np.maximum(n, low))

    def search(self, heads: Heads) -> np.ndarray:
        """All sizes within reach, the ladder's own among them, ascending.

        Between two of the ladder's sizes costs may fall with N, where models turn wider at once:
        their least values lie at those sizes.
        """
        nodes = [n_formula(L, d, *heads[:2], self.head_dim) for L, d in self.ladder]
        grid = np.geomspace(*self.reach(heads), 2000)
        return np.union1d(grid, self.from_formula(np.array(nodes, float), heads))

    def model(self, layers: int, width: int, heads: Heads) -> ModelConfig:
        """The model of this shape, built as the runs were; an FFN of their own keeps its ratio."""
        t = self.template
        d_ff = t.d_ff and round_up(t.d_ff * width / t.d_model, 32)
        own = {"n_heads": heads[0], "n_kv_heads": heads[1], "pattern": pattern_of(heads)}
        return dataclasses.replace(t, n_layers=layers, d_model=width, d_ff=d_ff, **own)

    def embeddings(self, width: np.ndarray | float) -> Any:
        """Parameters of the embedding and, where it is not tied, the output matrix."""
        return (1 if self.template.tie_embeddings else 2) * self.template.vocab_size * width


def scale_of(results: Results) -> Scale:
    """The ladder and counting of these runs; UserError when they mix head sizes."""
    r = results
    dims = sorted(set(r.head_dim.tolist()))
    require(
        len(dims) == 1,
        f"{r.source}: the runs mix head sizes {', '.join(map(str, dims))}; a configuration would "
        "not say what it costs: fit one head size at a time",
    )
    ratios: dict[Heads | None, tuple[np.ndarray, np.ndarray]] = {None: (np.zeros(1), np.ones(1))}
    if (r.n_layers > 0).all():
        order = np.argsort(r.n_params)
        n = r.n_params[order]
        formula = n_formula(r.n_layers, r.d_model, r.n_heads, r.n_kv_heads, r.head_dim)[order] / n
        ratios[None] = np.log(n), formula
        for heads in set(r.heads):
            own = np.array([h == heads for h in r.heads])[order]
            ratios[heads] = np.log(n[own]), formula[own]
    vocab = int(r.vocab_size[0]) or 50304
    template = r.template or ModelConfig(1, 64, 1, 1, head_dim=dims[0], vocab_size=vocab)
    trained = float(r.n_params.min()), float(r.n_params.max())
    return Scale(r.ladder, dims[0], template, ratios, r.count, trained)


def costs_at(
    n: np.ndarray,
    heads: Heads,
    context: int,
    question: Question,
    scale: Scale,
    serving: Serving | None = None,
) -> tuple[Costs, np.ndarray, np.ndarray]:
    """Costs at N*, and the (L, d) they were taken at; infinite where N* is.

    Heads with a pattern read and keep T_eff keys (`shapes.effective_context`) of the T in `context`.
    """
    n = np.asarray(n, float)
    layers, width = shapes(scale.to_formula(n, heads), heads, scale.head_dim, scale.ladder)
    keys, convention = effective_context(heads, layers, context), question.convention
    memory = inference_memory(n, keys, layers, scale.head_dim, heads[1])
    flops = inference_flops(n, context, layers, scale.head_dim, heads[0], convention, keys)
    fixed = inference_flops(n, context, 0, scale.head_dim, heads[0], convention)
    z = HardwareCost(question.weight, question.memory_power, question.compute_power)
    s = serving or Serving()
    cached = kv_cache_values(keys, layers, scale.head_dim, heads[1])
    read = s.weight_bytes * n + s.cache_bytes * s.batch * cached
    held = read + s.weight_bytes * scale.embeddings(width)
    seconds = dollars = np.full_like(n, math.nan)
    if s.hardware:
        compute = s.batch * inference_flops(n, keys, layers, scale.head_dim, heads[0])
        busy = compute / (s.hardware.peak_flops * s.hardware.mfu)
        step = np.maximum(busy, read / s.hardware.bandwidth)
        seconds = step / s.batch
        dollars = seconds * s.hardware.price / 3600 * 1e6
    costs = Costs(memory, flops, z(memory, flops), n, fixed, held, seconds, dollars)
    return costs, layers, width


# ------------------------------------------------------------------------------------ the answer


def target_losses(fit: Fit, most: int = 3) -> tuple[float, ...]:
    """A few round losses inside the range that every configuration's curve covers.

    Raises UserError when there is none: the curves of these configurations do not overlap.
    """
    ends = [fit.curves.loss(k, np.array(fit.points.range_n(k))) for k in range(len(fit.heads))]
    high, low = min(e.max() for e in ends), max(e.min() for e in ends)
    require(
        low < high,
        f"{fit.source}: no loss lies on every configuration's curve (the best of one is "
        f"{low:.3f} nats, the worst of another {high:.3f}); name target losses",
    )
    for digits in itertools.count(1):
        step = 10.0**-digits
        inside = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
        if len(inside) >= most:
            chosen = inside[np.linspace(0, len(inside) - 1, most).round().astype(int)]
            return tuple(round(float(v), digits) for v in chosen[::-1])
    raise AssertionError


def default_baseline(heads: Sequence[Heads]) -> Heads:
    """The most query heads and, among those, the most KV heads; a dense one where there is any."""
    return max([h for h in heads if pattern_of(h) is None] or heads)


def require_costs(objective: Objective, serving: Serving) -> None:
    """Raise UserError where the objective is not one, or where its costs need what is not said."""
    require(
        objective in OBJECTIVES, f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}"
    )
    require(
        serving.hardware is not None or objective not in ("seconds", "dollars"),
        f"objective={objective!r} needs hardware: name a row such as v5e or h100",
    )
    require(
        objective != "dollars" or serving.hardware.price > 0,
        "objective='dollars' needs a price above 0: name one, or rank by 'seconds'",
    )


def frontier(
    fit: Fit,
    results: Results,
    question: Question | None = None,
    objective: Objective = "z",
    serving: Serving | None = None,
    *,
    gains: bool = True,
) -> Frontier:
    """Rank every configuration for each target loss and context of the question.

    Without `gains` nothing is sought at equal cost, which takes most of the time: for maps.

    `results` are the runs behind the fit: their ladder, head size and vocabulary make shapes of
    N*. `serving` says how costs in bytes, seconds and dollars come about and what must hold.
    Raises UserError for a baseline or an objective that is not there.
    """
    q, s = question or Question(), serving or Serving()
    require_costs(objective, s)
    scale = scale_of(results)
    losses = q.losses or target_losses(fit)
    baseline = tuple(q.baseline) if q.baseline else default_baseline(fit.heads)
    fit.index(baseline)
    answers = tuple(
        _answer(fit, scale, q, s, loss, context, objective, baseline, gains)
        for loss in losses
        for context in q.contexts
    )
    return Frontier(
        source=fit.source,
        count=fit.count,
        train_context=_trained(fit, results),
        question=q,
        objective=objective,
        serving=s,
        baseline=baseline,
        losses=tuple(losses),
        answers=answers,
        intervals=fit.how,
        flags=(*fit.flags, *_flags(answers, fit, results, scale, q, baseline)),
        doubt=_doubt(fit),
    )


def _trained(fit: Fit, results: Results) -> int:
    return int(fit.context_length or results.context_length.max())


def _doubt(fit: Fit) -> str:
    """Why no answer should be read off this fit, whatever its intervals say; "" if it may."""
    reasons = [
        (not fit.converged, "the fit did not converge"),
        (bool(fit.at_bound), "E is at its bound, not identified by these runs"),
        (fit.rank < fit.n_parameters, "the runs do not determine every parameter"),
        (fit.refits_failed > fit.refits / 10, "many refits did not converge"),
        (not fit.r2 > 0.9, f"the curves explain the runs badly (R² = {fit.r2:.2f})"),
    ]
    return "; ".join(words for holds, words in reasons if holds)


def _answer(
    fit: Fit,
    scale: Scale,
    q: Question,
    serving: Serving,
    loss: float,
    context: int,
    objective: Objective,
    baseline: Heads,
    gains: bool,
) -> Answer:
    n, n_draws = (
        np.stack([scale.within(n[..., k], heads) for k, heads in enumerate(fit.heads)], -1)
        for n in (fit.curves.n_star(loss), fit.draws.n_star(loss))
    )
    point, draw, shape = [], [], []
    for k, heads in enumerate(fit.heads):
        costs, layers, width = costs_at(n[k], heads, context, q, scale, serving)
        point.append(costs)
        shape.append((float(layers), float(width)))
        draw.append(costs_at(n_draws[:, k], heads, context, q, scale, serving)[0])

    def allowed(costs: Costs, heads: Heads) -> np.ndarray:
        fits = (costs.bytes <= serving.limit_bytes) & (heads[1] % serving.kv_multiple == 0)
        return np.where(fits, getattr(costs, objective), math.inf)

    both = list(zip(fit.heads, point, draw, strict=True))
    cost = np.array([float(allowed(c, heads)) for heads, c, _ in both])
    draws = np.stack([allowed(c, heads) for heads, _, c in both], axis=1)
    probability, regret = decide(draws)
    least = cost.min()
    base = fit.index(baseline)
    budgets = np.r_[getattr(point[base], objective), getattr(draw[base], objective)]

    def afforded(k: int, free: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Largest sizes and their losses, the point estimate's first; `free` of what must hold."""
        if not gains:
            return np.full_like(budgets, math.nan), np.full_like(budgets, math.nan)
        heads = fit.heads[k]
        may = free or heads[1] % serving.kv_multiple == 0
        limit = math.inf if free else serving.limit_bytes

        def load(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            costs = costs_at(n, heads, context, q, scale, serving)[0]
            held = costs.bytes / limit if may else np.full_like(n, math.inf)
            return getattr(costs, objective), held

        own = np.r_[n[k], n_draws[:, k]] if k == base else None
        sizes = largest(load, scale.search(heads), budgets, own)
        return sizes, np.r_[_losses(fit.curves, k, sizes[:1]), _losses(fit.draws, k, sizes[1:])]

    _, least_of_baseline = afforded(base, free=True)
    choices = []
    for k, heads in enumerate(fit.heads):
        low, high = fit.points.range_n(k)
        kinds = dict.fromkeys(("z", "memory", "flops", objective))
        saving = {m: _saving(getattr(point[k], m), getattr(point[base], m)) for m in kinds}
        over = {m: _saving(getattr(draw[k], m), getattr(draw[base], m)) for m in kinds}
        choices.append(
            Choice(
                heads=heads,
                n=float(n[k]),
                n_interval=interval(n_draws[:, k]),
                n_layers=shape[k][0],
                d_model=shape[k][1],
                memory=float(point[k].memory),
                memory_fixed=float(point[k].memory_fixed),
                flops=float(point[k].flops),
                flops_fixed=float(point[k].flops_fixed),
                z=float(point[k].z),
                effective=float(effective_context(heads, np.array(shape[k][0]), context)),
                cost=float(cost[k]),
                excess=float(cost[k] / least - 1) if np.isfinite(cost[k]) else math.inf,
                probability=float(probability[k]),
                regret=float(regret[k]),
                unreachable=float(np.isinf(draws[:, k]).mean()),
                extrapolated=not low <= n[k] <= high,
                bytes=float(point[k].bytes),
                saving={m: float(v) for m, v in saving.items()},
                saving_interval={m: _finite_interval(v) for m, v in over.items()},
                equal_cost=_equal_cost(*afforded(k), least_of_baseline, (low, high)),
            )
        )
    choices.sort(key=lambda c: (c.cost, -c.probability, c.heads))
    best = choices[0]
    model = None
    with contextlib.suppress(UserError):  # a pattern may not fit the few layers of a small model
        model = build(fit, scale, q, best, context, serving) if best.reached else None
    if model and model.weight_bytes + model.cache_bytes > serving.limit_bytes:
        model = None
    return Answer(
        loss=float(loss),
        context=context,
        choices=tuple(choices),
        tied=tied(choices),
        margin=choices[1].excess if len(choices) > 1 else math.inf,
        baseline_unreachable=float(np.isinf(n_draws[:, base]).mean()),
        model=model,
    )


def _saving(cost: Any, baseline: Any) -> Any:
    """1 - cost / baseline; NaN where the baseline never reaches the loss."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(baseline), math.nan, 1 - np.divide(cost, baseline))


def _equal_cost(
    sizes: np.ndarray, losses: np.ndarray, baseline: np.ndarray, trained: Interval
) -> EqualCost:
    """From sizes, their losses and the baseline's, the point estimate's first in each."""
    gains = baseline - losses
    return EqualCost(
        n=float(sizes[0]),
        n_interval=_finite_interval(sizes[1:]),
        loss=float(losses[0]),
        gain=float(gains[0]),
        gain_interval=_finite_interval(gains[1:]),
        extrapolated=not trained[0] <= sizes[0] <= trained[1],
    )


def _losses(curves: Curves, k: int, n: np.ndarray) -> np.ndarray:
    """Loss in nats of configuration k, each draw at its own N; n has the draws' shape."""
    if curves.backbone:
        n = curves.backbone.to_backbone(k, n)
    return laws.centred(n, curves.u[..., k], curves.b[..., k], curves.floor, curves.centre[k])


def largest(
    load: Load, grid: np.ndarray, budgets: np.ndarray, known: np.ndarray | None = None
) -> np.ndarray:
    """For each budget the largest N that costs no more and holds what must hold.

    `load` gives, for an array of N, the costs and what is held as a share of what may be. Costs
    need not rise everywhere, but their least values lie on the ascending `grid`. NaN where no size
    is as cheap, or the budget is no finite number; the grid's end is the largest size there is.

    Costs that differ by rounding alone are equal (`_ROUNDING`): which of two is smaller by its last
    bit differs from processor to processor. Where the budgets are the costs of `known` sizes, these
    cost no more than themselves, so that none comes out smaller than it is.
    """

    def over(cost: np.ndarray, held: np.ndarray) -> np.ndarray:
        """At most 0 where a size is within what it may cost and hold."""
        return np.log(np.maximum(cost / budgets, held)) - _ROUNDING

    cost, held = load(grid)
    cheapest_from = np.minimum.accumulate(np.where(held <= 1, cost, math.inf)[::-1])[::-1]
    last = np.searchsorted(cheapest_from, budgets * (1 + _ROUNDING), side="right") - 1
    none, endless = (last < 0) | ~np.isfinite(budgets), last == len(grid) - 1
    i = np.clip(last, 0, len(grid) - 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        x0, x1 = np.log([grid[i], grid[i + 1]])
        y0, y1 = over(cost[i], held[i]), over(cost[i + 1], held[i + 1])
        found, before = y0, np.zeros(len(budgets))
        for _ in range(_STEPS):
            if np.all(none | endless | (found >= -2 * _ROUNDING)):
                break
            x = np.clip(x0 - y0 * (x1 - x0) / (y1 - y0), x0, x1)
            y = over(*load(np.exp(x)))
            side = np.where(y <= 0, -1, 1)
            # False position moves one end of the bracket alone where costs bend, and never the one
            # that is wanted where they bend the other way. Halving the value of an end that stayed
            # twice makes it move (the Illinois rule).
            y0, y1 = (
                np.where((before == side) & (side != s), v / 2, v) for s, v in ((-1, y0), (1, y1))
            )
            x0, y0, found = (np.where(side < 0, *v) for v in ((x, x0), (y, y0), (y, found)))
            x1, y1 = (np.where(side > 0, *v) for v in ((x, x1), (y, y1)))
            before = side
    sizes = np.where(none, math.nan, np.where(endless, grid[-1], np.exp(x0)))
    if known is None:
        return sizes
    with np.errstate(invalid="ignore"):
        holds = np.isfinite(known) & (load(known)[1] <= 1)
    return np.fmax(sizes, np.where(holds, known, math.nan))


def _finite_interval(draws: np.ndarray) -> Interval:
    kept = draws[~np.isnan(draws)]
    return interval(kept) if len(kept) else (math.nan, math.nan)


def decide(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of being cheapest and expected regret, from costs (draws, configurations).

    Draws in which nothing reaches the loss say nothing and are left out; the regret of a
    configuration that misses it in some other draw is infinite.
    """
    least = draws.min(1)
    kept = np.isfinite(least)
    if not kept.any():
        return np.zeros(draws.shape[1]), np.full(draws.shape[1], math.nan)
    draws, least = draws[kept], least[kept]
    probability = np.bincount(draws.argmin(1), minlength=draws.shape[1]) / len(draws)
    return probability, (draws / least[:, None] - 1).mean(0)


def tied(choices: Sequence[Choice], level: float = LEVEL) -> tuple[Heads, ...]:
    """The fewest configurations that hold `level` of the probability, most probable first.

    `choices[0]`, the cheapest by the curves, is always among them; none where it misses the loss.
    """
    if not choices[0].reached:
        return ()
    out, held = [], 0.0
    for choice in sorted(choices, key=lambda c: -c.probability):
        if held >= level - 1e-12 or not choice.probability:
            break
        out.append(choice.heads)
        held += choice.probability
    return tuple(out) if choices[0].heads in out else (*out, choices[0].heads)


def build(
    fit: Fit, scale: Scale, q: Question, choice: Choice, context: int, serving: Serving
) -> Model:
    """The nearest model one can build to a choice's N*, what it would reach and cost."""
    heads = choice.heads
    multiple = max(8, min(64, reduce(math.gcd, (d for _, d in scale.ladder))))
    wanted = float(scale.to_formula(choice.n, heads))
    shape = nearest_buildable(wanted, *heads[:2], scale.head_dim, scale.ladder, multiple)
    layers, width = int(shape.n_layers), int(shape.d_model)
    config = scale.model(layers, width, heads)
    formula = n_formula(layers, width, *heads[:2], scale.head_dim)
    n = {
        "n_exact": float(n_exact(config)),
        "n_formula": float(formula),
        "n_given": formula * choice.n / wanted,
    }[scale.count]
    k = fit.index(heads)
    patterns, size = config.layer_patterns, (layers, scale.head_dim)
    keys = context_sharding.effective_context(patterns, context)
    memory = inference_memory(n, keys, *size, heads[1])
    flops = inference_flops(n, context, *size, heads[0], q.convention, keys)
    cache = context_sharding.kv_cache_values(patterns, context, scale.head_dim)
    return Model(
        n_layers=layers,
        d_model=width,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=scale.head_dim,
        vocab_size=config.vocab_size,
        n=n,
        n_exact=n_exact(config),
        parameters=parameters(config).total,
        loss=float(fit.curves.loss(k, n)),
        loss_interval=interval(fit.draws.loss(k, n)),
        run_interval=run_interval(fit, k, n),
        memory=memory,
        flops=flops,
        z=float(HardwareCost(q.weight, q.memory_power, q.compute_power)(memory, flops)),
        weight_bytes=serving.weight_bytes * parameters(config).total,
        cache_bytes=serving.cache_bytes * serving.batch * cache,
        config=config,
    )


def run_interval(fit: Fit, k: int, n: float) -> Interval:
    """Where the loss of one run of configuration k at N is expected, in nats, at 90%.

    The curve's draws, each with one run's noise around it; a new seed of that size would err so.
    """
    normal = ndtri((np.arange(99) + 0.5) / 99)
    return interval((fit.draws.loss(k, n)[:, None] + fit.sigma * normal).ravel())


def check_runs(fit: Fit, runs: Results) -> tuple[Check, ...]:
    """Runs that the fit has not seen against its curves; those of unknown heads are left out."""
    out = []
    for i, heads in enumerate(runs.heads):
        if heads in fit.heads:
            k, n = fit.index(heads), float(runs.n_params[i])
            shape = (int(runs.n_layers[i]), int(runs.d_model[i]))
            predicted, where = float(fit.curves.loss(k, n)), run_interval(fit, k, n)
            name, loss = str(runs.name[i]), float(runs.loss[i])
            out.append(Check(name, heads, *shape, n, predicted, where, loss))
    return tuple(out)


def _goal(answer: Answer) -> str:
    return f"{answer.loss:g} nats at {answer.context:,} tokens"


def beyond_training(heads: Sequence[Heads], trained: int, q: Question) -> list[str]:
    """What answers assume at contexts longer than `trained` tokens, where losses were measured."""
    if not trained or max(q.contexts) <= trained:
        return []
    out = [
        f"losses were measured at T = {trained:,} tokens: beyond it the answer assumes that "
        "differences between configurations stay as they are"
    ]
    if any(map(pattern_of, heads)):
        out.append(
            f"losses of sharded configurations, too, are those at T = {trained:,} tokens: only their "
            "costs follow the context. That heads which then read a smaller share of it lose no more "
            "is untested, for windows alone above all; train some at a longer T, and judge loss by "
            "position and retrieval beside the mean loss"
        )
    return out


def _flags(
    answers: Sequence[Answer],
    fit: Fit,
    results: Results,
    scale: Scale,
    q: Question,
    baseline: Heads,
) -> list[str]:
    out = beyond_training(fit.heads, _trained(fit, results), q)
    reach = {heads: scale.reach(heads) for heads in fit.heads}
    most = quantity(max(high for _, high in reach.values()))
    where = [
        f"{a.loss:g} at {a.context:,}" for a in answers if a.best.extrapolated and a.best.reached
    ]
    if where:
        out.append(
            f"the best configuration's N* lies outside its fitted sizes for {len(where)} of "
            f"{len(answers)} answers (marked ~): {'; '.join(where[:3])}{' ...' if len(where) > 3 else ''}"
        )
    lost = [_goal(a) for a in answers if not a.best.reached]
    if lost:
        out.append(
            f"no configuration reaches {'; '.join(lost)} with what must hold, at any size that can be "
            f"built, up to {most} parameters"
        )
    easy = [_goal(a) for a in answers if a.best.reached and a.best.n <= reach[a.best.heads][0]]
    if easy:
        out.append(f"the smallest size that can be built reaches {'; '.join(easy)}: ask for less")
    missed = [
        f"{a.best.unreachable:.0%} of the refits never reach {_goal(a)}"
        for a in answers
        if a.best.reached and a.best.unreachable > MISSED
    ]
    if missed:
        out.append(
            f"with the best configuration and what must hold, {'; '.join(missed)}, at any size that "
            f"can be built, up to {most} parameters"
        )
    capped = [
        _goal(a) for a in answers if a.lowest and a.lowest.equal_cost.n >= reach[a.lowest.heads][1]
    ]
    if capped:
        out.append(
            f"what is gained at equal cost ends at the largest size that can be built, {most} "
            f"parameters, for {'; '.join(capped)}"
        )
    unsaved = [
        f"{a.baseline_unreachable:.0%} of the refits for {_goal(a)}"
        for a in answers
        if a.best.reached and a.baseline_unreachable > MISSED
    ]
    if unsaved:
        out.append(
            f"the baseline {pair(baseline)} never reaches the loss, so that savings "
            f"leave them out, in {'; '.join(unsaved)}"
        )
    unbuilt = [_goal(a) for a in answers if a.best.reached and a.model is None]
    if unbuilt:
        out.append(f"no model near the best N* can be built within the bytes: {'; '.join(unbuilt)}")
    open_ended = [a for a in answers if len(a.tied) > 1]
    if open_ended:
        out.append(
            f"the noise cannot separate the best configuration in {len(open_ended)} of "
            f"{len(answers)} answers: they are printed as tied"
        )
    if not results.n_layers.all():
        out.append("the data has no layer counts: shapes follow the published ladder")
    return out
