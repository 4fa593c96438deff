"""Model sizes: the published ladders, and models of other shapes that have as many parameters.

A ladder is a sequence of (L, d); `study/shapes.py` goes from a real-valued N to shapes between its sizes.

What can be built is bounded here, once for everything that reads, seeks or answers with a size. The
absolute limits are far above any model ever trained. A study is bounded more tightly, by what it
has trained (`REACH`): a curve says nothing of a model a million times larger than all that it rests
on, and the costs of such a model are numbers without meaning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gqa_scaling.config import ModelConfig, require
from gqa_scaling.costs import n_exact

Ladder = Sequence[tuple[int, int]]  # (L, d) of each size
MOST_PARAMETERS = 1e15  # without embeddings
REACH = (1e-4, 1e6)  # of a study: times the least and the largest N that it has trained


@dataclass(frozen=True)
class Size:
    """A named size that Chen et al. 2025 trained, with its maximum learning rate (appendix)."""

    name: str
    n_layers: int
    d_model: int
    learning_rate: float


TRAINED_SIZES = (
    Size("3M", 4, 256, 1e-3),
    Size("19M", 6, 512, 1e-3),
    Size("85M", 12, 768, 1e-3),
    Size("150M", 12, 1024, 1e-3),
    Size("200M", 16, 1024, 5e-4),
    Size("470M", 24, 1280, 5e-4),
    Size("680M", 24, 1536, 2e-4),
    Size("1.2B", 36, 1536, 2e-4),
)
# 1.8B, 4B, 6B, 13B, 33B and 64B: never trained, for interpolation only
INTERPOLATION_LADDER = ((36, 2048), (48, 2560), (54, 3072), (64, 4096), (72, 6144), (80, 8192))
PUBLISHED_LADDER = tuple((s.n_layers, s.d_model) for s in TRAINED_SIZES) + INTERPOLATION_LADDER
FIGURE_2_LADDER = tuple((n, 64 * n) for n in (12, 16, 20, 24, 28, 32))


def at_size(
    like: ModelConfig, model: ModelConfig, ffn_ratio: float | None = None, multiple: int = 64
) -> ModelConfig:
    """The model of `model`'s layers and heads that has as many parameters as `like`, to a percent.

    Of the widths that are multiples of `multiple`, the one at which the FFN that is left for them is
    nearest to `ffn_ratio` times as wide (without one, as in `like`), in multiples of half of that.
    Raises UserError where none has an FFN.
    """
    n, ratio = n_exact(like), ffn_ratio or like.ffn_dim / like.d_model

    def built(d: int) -> ModelConfig | None:
        step = max(1, multiple // 2)
        bare, one = (n_exact(replace(model, d_model=d, d_ff=k * step)) for k in (1, 2))
        steps = 1 + round((n - bare) / (one - bare))
        return replace(model, d_model=d, d_ff=steps * step) if steps > 0 else None

    most = math.ceil(math.sqrt(n / model.n_layers) / multiple)  # an FFN a third as wide
    found = [built(k * multiple) for k in range(1, most + 1)]
    near = [m for m in found if m is not None and abs(n_exact(m) / n - 1) < 0.02]
    require(
        bool(near),
        f"no model of N={n:,} has {model.n_layers} layers and heads ({model.n_heads},"
        f"{model.n_kv_heads}) of size {model.head_dim}: take fewer or smaller heads",
    )
    return min(near, key=lambda m: abs(math.log(m.ffn_dim / m.d_model / ratio)))
