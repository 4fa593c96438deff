"""From a real-valued N* to a model that can be built, and what one run of it is expected to reach."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from gqa_scaling import context_sharding
from gqa_scaling.config import ModelConfig
from gqa_scaling.costs import n_exact, parameters
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import Heads, Results, heads_of
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import nearest_buildable, width_step
from gqa_scaling.study.uncertainty import interval

_ARCHITECTURE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 99) for i in range(99)])


@dataclass(frozen=True)
class Model:
    """A model that can be built, nearest to a real-valued N*.

    `n` is counted as the fit counts, `loss` is the fitted curve there, in nats, with the intervals
    of the curve and of one run around it; `parameters` is the whole built model. Memory is in
    values; bytes are of the weights (embeddings included) and the whole batch's KV caches as they
    are allocated (`context_sharding.kv_cache_values`), at the bytes a value that `Serving` says.
    `command` trains it, "" where the runs come without a corpus; `trained` names the run of the
    study that it is, "" for a new one.
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


def build(fit: Fit, deployment: Deployment, heads: Heads, n: float) -> Model:
    """The nearest model one can build to N* = n of these heads, what it would reach and cost.

    Raises UserError where the pattern of the heads does not fit the layers of that model.
    """
    family, serving, context = deployment.family, deployment.serving, deployment.context
    wanted, step = float(family.to_formula(n, heads)), width_step(family.ladder)
    layers, width = nearest_buildable(wanted, heads, family.head_dim, family.ladder, step)
    config = family.model(layers, width, heads)
    exact, total = n_exact(config), parameters(config).total
    formula = family.formula(layers, width, heads)
    counts = {"n_exact": float(exact), "n_formula": float(formula), "n_given": formula * n / wanted}
    counted, k = counts[family.count], fit.index(heads)
    patterns = config.layer_patterns
    keys = context_sharding.effective_context(patterns, context)
    costs = deployment.costs_of_shape(counted, heads, layers, width, keys)
    cache = context_sharding.kv_cache_values(patterns, context, family.head_dim)
    draws = fit.draws.loss(k, counted)
    return Model(
        **{name: getattr(config, name) for name in _ARCHITECTURE},
        n=counted,
        n_exact=exact,
        parameters=total,
        loss=float(fit.curves.loss(k, counted)),
        loss_interval=interval(draws),
        run_interval=run_interval(fit, draws),
        memory=costs.memory,
        flops=costs.flops,
        z=float(costs.z),
        weight_bytes=serving.weight_bytes * total,
        cache_bytes=serving.cache_bytes * serving.batch * cache,
        config=config,
    )


# ----------------------------------------------------------------- runs that the fit has not seen


@dataclass(frozen=True)
class Check:
    """A run that the fit has not seen: its loss in nats, and what the curve had predicted."""

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
        return self.measured - self.predicted


def run_interval(fit: Fit, draws: np.ndarray) -> Interval:
    """Where the loss of one run of a size without runs is expected, in nats, at 90%.

    `draws` are those of the curve at its N. Around each lies the noise of one run and the error that
    the runs of its size share, both as large as the runs allow.
    """
    own = fit.shared.of_new_runs(len(draws), np.random.default_rng(fit.seed))
    run = interval((draws[:, None] + own[:, None] * _NORMAL).ravel())
    curve = interval(draws)  # of draws far from each other noise may fill a gap at an end
    return min(run[0], curve[0]), max(run[1], curve[1])


def check_runs(fit: Fit, runs: Results) -> tuple[Check, ...]:
    """Runs that the fit has not seen against its curves; those of unknown heads are left out."""
    out = []
    for i, heads in enumerate(runs.heads):
        if heads in fit.heads:
            k, n = fit.index(heads), float(runs.n_params[i])
            out.append(
                Check(
                    name=str(runs.name[i]),
                    heads=heads,
                    n_layers=int(runs.n_layers[i]),
                    d_model=int(runs.d_model[i]),
                    n=n,
                    predicted=float(fit.curves.loss(k, n)),
                    run_interval=run_interval(fit, fit.draws.loss(k, n)),
                    measured=float(runs.loss[i]),
                )
            )
    return tuple(out)
