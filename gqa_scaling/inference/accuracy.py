"""What a cache of fewer bits changes: the error of logits, and the change of the loss."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gqa_scaling.config import require
from gqa_scaling.fields import Json
from gqa_scaling.files.timings import CacheName
from gqa_scaling.inference.decode import empty_cache, step
from gqa_scaling.inference.generate import Decoder


@dataclass(frozen=True)
class CacheError(Json):
    """Logits decoded with one type of cache against those with a float32 one, on the same tokens.

    `largest` and `rms` are differences of logits, `logits_rms` how large these are about their mean;
    losses are means in nats over `targets` next tokens, and `same_choice` is the share of positions
    where both have the same likeliest token.
    """

    cache: str
    largest: float
    rms: float
    logits_rms: float
    loss: float
    loss_change: float
    same_choice: float
    targets: int

    @property
    def sentence(self) -> str:
        return (
            f"{self.cache} cache against float32: logits differ by {self.rms:.2g} (rms; at most "
            f"{self.largest:.2g}, logits spread by {self.logits_rms:.2g}), the loss by "
            f"{self.loss_change:+.1e} nats of {self.loss:.3f}, the likeliest token at "
            f"{1 - self.same_choice:.2%} of {self.targets:,} positions"
        )


def cache_error(decoder: Decoder, tokens_BT: ArrayLike, cache: CacheName) -> CacheError:
    """The error of a type of cache where `tokens_BT` are decoded one by one.

    Rows must be of one length, at least 2, and on a mesh a multiple of its `data` axis.
    """
    tokens_BT = np.asarray(tokens_BT, np.int32)
    B, T = tokens_BT.shape
    require(T > 1, f"{T} tokens have no next one to predict: give at least 2")
    types: tuple[CacheName, CacheName] = ("float32", cache)
    losses, square, spread, largest, same = np.zeros(2), 0.0, 0.0, 0.0, 0
    with jax.set_mesh(decoder.mesh):
        caches = [empty_cache(decoder.config, B, T, each) for each in types]
        for t in range(T - 1):
            found = []
            for i, held in enumerate(caches):
                logits_BV, caches[i] = step(
                    decoder.config, decoder.parameters, held, tokens_BT[:, t]
                )
                found.append(logits_BV[:, : decoder.vocab_size])
            sums = _compare(*found, tokens_BT[:, t + 1])
            nll, squares, spreads, most, equal = (np.asarray(x, np.float64) for x in sums)
            losses += nll
            square, spread = square + float(squares), spread + float(spreads)
            largest, same = max(largest, float(most)), same + int(equal)
    targets, values = B * (T - 1), B * (T - 1) * decoder.vocab_size
    return CacheError(
        cache=cache,
        largest=largest,
        rms=(square / values) ** 0.5,
        logits_rms=(spread / values) ** 0.5,
        loss=float(losses[0] / targets),
        loss_change=float((losses[1] - losses[0]) / targets),
        same_choice=same / targets,
        targets=targets,
    )


@jax.jit
def _compare(a_BV: jax.Array, b_BV: jax.Array, target_B: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over sequences: both losses, squares of differences and of logits about their mean; the
    largest difference, and how often both have the same choice."""
    log_p = [jax.nn.log_softmax(x, axis=-1) for x in (a_BV, b_BV)]
    nll = [-jnp.take_along_axis(x, target_B[:, None], axis=-1).sum() for x in log_p]
    difference = b_BV - a_BV
    about_mean = a_BV - a_BV.mean(-1, keepdims=True)
    return (
        jnp.stack(nll),
        jnp.square(difference).sum(),
        jnp.square(about_mean).sum(),
        jnp.abs(difference).max(),
        (a_BV.argmax(-1) == b_BV.argmax(-1)).sum(),
    )
