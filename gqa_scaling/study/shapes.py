"""What a number of parameters N means in models: layers, width, and the keys that heads read.

Most functions take arrays, for the draws of a bootstrap need shapes by the thousands.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import MOST_LAYERS, ModelConfig, require
from gqa_scaling.context_sharding import ContextSharding, keys_by_depth
from gqa_scaling.costs import Number, n_formula
from gqa_scaling.experiment.ladder import MOST_PARAMETERS, REACH, Ladder
from gqa_scaling.fields import round_up
from gqa_scaling.study.results import Count, Heads, Results, pattern_of

DEFAULT_VOCABULARY = 50304  # tokens, where the data does not say: that of the published runs


def shapes(n: np.ndarray, heads: Heads, head_dim: int, ladder: Ladder) -> tuple[Any, Any]:
    """The real-valued (L, d) on the ladder whose `n_formula` equals each of `n`; inf where that is inf.

    The aspect ratio d/L is linear in N between the two nearest sizes, counted at these heads, and
    constant beyond the ladder's ends; L follows from N (Chen et al. 2025, section 4.1, step 3).
    """
    sizes = np.array(
        sorted((n_formula(L, d, heads[0], heads[1], head_dim), d / L) for L, d in ladder)
    )
    n = np.asarray(n, float)
    finite = np.where(np.isfinite(n), n, 1.0)
    ratio = np.interp(finite, sizes[:, 0], sizes[:, 1])
    cubic, square = 8 * ratio**2, 2 * ratio * head_dim * (heads[0] + heads[1])
    layers = (finite / cubic) ** (1 / 3)  # above the root: Newton falls onto it monotonically
    for _ in range(60):
        value = cubic * layers**3 + square * layers**2 - finite
        step = value / (3 * cubic * layers**2 + 2 * square * layers)
        layers = layers - step
        if np.all(np.abs(step) <= 1e-14 * layers):
            break
    layers = np.where(np.isfinite(n), layers, np.inf)
    return layers, ratio * layers


def nearest_buildable(
    n: float, heads: Heads, head_dim: int, ladder: Ladder, multiple: int = 64
) -> tuple[int, int]:
    """The whole (L, d), d a multiple of `multiple`, whose `n_formula` is nearest to `n`.

    Nearest in N and in aspect ratio together, the ratio counting a quarter, both on a log scale.
    """
    require(0 < n < math.inf, f"N={n} must be greater than 0 and finite")
    ideal, wide = map(float, shapes(np.array(n), heads, head_dim, ladder))
    middle, width = round(ideal), round(wide / multiple)
    spread = min(max(1, round(0.15 * ideal)), 16)

    def distance(size: tuple[int, int]) -> float:
        built = n_formula(*size, heads[0], heads[1], head_dim)
        aspect = (size[1] / size[0]) / (wide / ideal)
        return abs(math.log(built / n)) + abs(math.log(aspect)) / 4

    layers = range(max(1, middle - spread), middle + spread + 1)
    widths = sorted({max(1, width + k) * multiple for k in range(-2, 3)})
    return min(((L, d) for L in layers for d in widths), key=distance)


def width_step(ladder: Ladder) -> int:
    """What the widths of new models are multiples of: what all of the ladder's are, from 8 to 64."""
    return max(8, min(64, math.gcd(*(d for _, d in ladder))))


# ------------------------------------------------------------------------ the models of a study


@dataclass(frozen=True)
class Family:
    """The models of a study: how it counts N, and which model has how many parameters.

    `ladder` are the study's own sizes (L, d), `template` is the architecture that new models are
    given, `trained` the least and the largest N of all runs. `ratios` holds, for each head
    configuration, ln N of its runs and the ratio of `n_formula` to the fit's own count there: 1 for
    published points, a little less for built models, whose FFN is rounded up. `rest` is the count of
    each size less its `n_formula`: no head enters it, so that configurations without runs have it too.
    """

    ladder: tuple[tuple[int, int], ...]
    head_dim: int
    template: ModelConfig
    ratios: dict[Heads, tuple[np.ndarray, np.ndarray]]
    rest: dict[tuple[int, int], float]
    count: Count
    trained: tuple[float, float]

    def formula(self, n_layers: Number, d_model: Number, heads: Heads) -> Number:
        return n_formula(n_layers, d_model, heads[0], heads[1], self.head_dim)

    def ratio(self, heads: Heads) -> tuple[np.ndarray, np.ndarray]:
        """ln N, ascending, and the ratio of `n_formula` to N there."""
        if heads in self.ratios:
            return self.ratios[heads]
        sizes = [(self.formula(L, d, heads), rest) for (L, d), rest in self.rest.items()]
        formula, rest = np.array(sorted(sizes) or [(1.0, 0.0)]).T
        return np.log(formula + rest), formula / (formula + rest)

    def counted(self, n_layers: np.ndarray, d_model: np.ndarray, heads: Any) -> np.ndarray:
        """The fit's own count of models of these shapes, whose heads may differ and be real-valued."""
        own = {n_formula(L, d, 0, 0): rest for (L, d), rest in self.rest.items()} or {1.0: 0.0}
        known = np.array(sorted(own))
        backbone = n_formula(n_layers, d_model, 0, 0)
        share = np.interp(backbone, known, [own[n] / n for n in known])
        return self.formula(n_layers, d_model, heads) + share * backbone

    def to_formula(self, n: np.ndarray | float, heads: Heads) -> np.ndarray:
        """`n_formula` of a model that the fit counts as n."""
        log_n, formula = self.ratio(heads)
        return n * np.interp(np.log(np.where(np.isfinite(n), n, 1.0)), log_n, formula)

    def from_formula(self, n: np.ndarray | float, heads: Heads) -> np.ndarray:
        """The fit's own count of a model whose `n_formula` is n."""
        log_n, formula = self.ratio(heads)
        return n / np.interp(np.log(n), log_n + np.log(formula), formula)

    def n_of(self, n_layers: Number, d_model: Number, heads: Heads) -> Any:
        """The fit's own count of models of this shape."""
        return self.from_formula(self.formula(n_layers, d_model, heads), heads)

    def shape(self, n: np.ndarray | float, heads: Heads) -> tuple[np.ndarray, np.ndarray]:
        """The real-valued (L, d) of models that the fit counts as n, inf where n is."""
        return shapes(self.to_formula(n, heads), heads, self.head_dim, self.ladder)

    def reach(self, heads: Heads) -> tuple[float, float]:
        """The least and the largest N of a configuration that this study takes for one to build.

        They are `ladder.REACH` times the least and the largest N trained. The largest has at most
        MOST_PARAMETERS, and at most MOST_LAYERS layers at the aspect ratio of the largest size.
        """
        layers, width = max(self.ladder, key=lambda s: self.formula(s[0], s[1], heads))
        deepest = self.formula(float(MOST_LAYERS), MOST_LAYERS * width / layers, heads)
        high = min(REACH[1] * self.trained[1], MOST_PARAMETERS)
        high = min(high, float(self.from_formula(deepest, heads)))
        return REACH[0] * self.trained[0], max(high, self.trained[1])

    def require_reached(self, n: float, heads: Heads, label: str) -> None:
        """Raise UserError where a model of N parameters, called so, is none that this study may speak of."""
        least, most = self.reach(heads)
        require(
            least <= n <= most,
            f"{label} has N = {n:.3g}; this study speaks of {least:.3g} to {most:.3g}",
        )

    def within(self, n: np.ndarray, heads: Heads) -> np.ndarray:
        """N*, infinite where it lies beyond reach; below reach the least size, which does as well."""
        low, high = self.reach(heads)
        return np.where(n > high, np.inf, np.maximum(n, low))

    def sizes(self, heads: Heads) -> np.ndarray:
        """A grid of N over all sizes within reach, the ladder's own among them, ascending.

        Between two of the ladder's sizes costs may fall with N, where models turn wider at once:
        their least values lie at those sizes.
        """
        nodes = np.array([self.formula(L, d, heads) for L, d in self.ladder], float)
        return np.union1d(np.geomspace(*self.reach(heads), 2000), self.from_formula(nodes, heads))

    def model(self, n_layers: int, d_model: int, heads: Heads) -> ModelConfig:
        """The model of this shape, built as the runs were; an FFN of their own keeps its ratio."""
        t = self.template
        return dataclasses.replace(
            t,
            n_layers=n_layers,
            d_model=d_model,
            d_ff=t.d_ff and round_up(t.d_ff * d_model / t.d_model, 32),
            n_heads=heads[0],
            n_kv_heads=heads[1],
            pattern=pattern_of(heads),
        )

    def embeddings(self, d_model: Number) -> Number:
        """Parameters of the embedding and, where it is not tied, the output matrix."""
        return (1 if self.template.tie_embeddings else 2) * self.template.vocab_size * d_model


def family_of(results: Results) -> Family:
    """The models that these runs belong to; UserError when they mix head sizes."""
    r = results
    head_dim = r.only(
        "head_dim",
        "the runs mix head sizes {}; a configuration would not say what it costs: fit one head size "
        "at a time",
    )
    ratios: dict[Heads, tuple[np.ndarray, np.ndarray]] = {}
    rest: dict[tuple[int, int], float] = {}
    if (r.n_layers > 0).all():
        order = np.argsort(r.n_params)
        n = r.n_params[order]
        formula = n_formula(r.n_layers, r.d_model, r.n_heads, r.n_kv_heads, r.head_dim)[order]
        shape = zip(r.n_layers[order].tolist(), r.d_model[order].tolist(), strict=True)
        rest = dict(zip(shape, (n - formula).tolist(), strict=True))
        for heads in set(r.heads):
            own = np.array([h == heads for h in r.heads])[order]
            ratios[heads] = np.log(n[own]), formula[own] / n[own]
    vocabulary = int(r.vocab_size[0]) or DEFAULT_VOCABULARY
    template = ModelConfig(1, 64, 1, 1, head_dim=head_dim, vocab_size=vocabulary)
    trained = float(r.n_params.min()), float(r.n_params.max())
    return Family(r.ladder, head_dim, r.template or template, ratios, rest, r.count, trained)


# ------------------------------------------------------------------------- what their heads read


def effective_context(heads: Heads, layers: np.ndarray, context: int) -> Any:
    """T_eff of a configuration in models of real-valued L: the context itself where it is dense.

    Keys over all layers, L T_eff, are those of `context_sharding.effective_context` at whole L and
    straight between them, so that costs rise with L as they do for dense models.
    """
    return _per_layer(heads, layers, context, training=False)


def training_keys(heads: Heads, layers: np.ndarray, context: int) -> Any:
    """Tbar (`costs.training_keys`) in models of real-valued L, between whole L as above."""
    return _per_layer(heads, layers, context, training=True) - 1 / 2


def _per_layer(heads: Heads, layers: np.ndarray, context: int, *, training: bool) -> Any:
    """Keys read, a mean over layers and KV heads, for the last token or one of a training run."""
    pattern = pattern_of(heads)
    if pattern is None:
        return (context + 1) / 2 if training else context
    finite = np.where(np.isfinite(layers), layers, 1.0)
    most = 2 ** int(np.ceil(np.log2(finite.max() + 1)))  # few tables serve all calls
    table = _keys(pattern, heads[1], context, most, training)
    return np.interp(finite, np.arange(most + 1), table) / finite


@functools.lru_cache(maxsize=256)
def _keys(
    pattern: ContextSharding, n_kv_heads: int, context: int, most: int, training: bool
) -> np.ndarray:
    """`keys_by_depth` as an array.

    It is as long as the deepest model asked for. Callers bound that by `Family.reach`, whose models
    have at most `config.MOST_LAYERS` layers, so that all tables kept here take at most 32 MiB.
    """
    return np.array(keys_by_depth(pattern, n_kv_heads, context, most, training))
