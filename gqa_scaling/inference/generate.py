"""A batch of prompts and what a model writes after them, token by token."""

import functools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from gqa_scaling.config import ModelConfig, UserError, require
from gqa_scaling.devices.mesh import constrain
from gqa_scaling.fields import round_up
from gqa_scaling.files.timings import CacheName
from gqa_scaling.inference.decode import (
    CHUNK,
    Cache,
    New,
    Parameters,
    copies_said,
    empty_cache,
    prefill,
    read,
    write,
)
from gqa_scaling.inference.sampling import GREEDY, Sampling, choose
from gqa_scaling.model.attention.shard import MASKED

LENGTHS = 128  # caches, and prompts taken at once, are so long or a multiple: few are compiled

Ended = Literal["stop", "tokens", "context"]  # by a stop token, all that was asked, no more room


@dataclass(frozen=True)
class Decoder:
    """A model that is ready: its config in the dtype that it is computed in, on its mesh.

    `vocab_size` is that of the tokenizer; the model may have rows beyond, which are never drawn.
    """

    config: ModelConfig
    parameters: Parameters
    mesh: Mesh
    vocab_size: int


class Generation:
    """The tokens that come after prompts; iterated over once, as they are made.

    Each item has the next token of every prompt, None where its text has ended. `ended` says why,
    when it has. A prompt's tokens depend on its text and seed alone, not on those beside it.

    At most `tokens` are made for each prompt, and none past `context` positions. It takes
    `first_token_seconds` until the first tokens are there and `seconds` until the latest; of a
    `warm` generation these begin once all is compiled, which takes `compile_seconds` before.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[ArrayLike],
        *,
        tokens: int,
        context: int,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | int = 0,
        stop: Collection[int] = (),
        cache: CacheName | None = None,
        warm: bool = False,
    ) -> None:
        """Raises `UserError` for no prompts, an empty one, or one that leaves no room to write."""
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        require(bool(arrays), "give at least one prompt")
        require(tokens > 0, f"tokens={tokens} must be greater than 0")
        for number, each in enumerate(arrays, 1):
            which = f"prompt {number}" if len(arrays) > 1 else "the prompt"
            require(len(each) > 0, f"{which} is empty: give it at least one token")
            if len(each) >= context:
                raise UserError(
                    f"{which} has {len(each)} tokens and leaves no room in a context of {context}: "
                    "shorten it, or make the context longer"
                )
        self.decoder, self.sampling, self.stop = decoder, sampling, frozenset(stop)
        self.prompts, self.cache_type, self.warm = arrays, cache, warm
        self.lengths = np.array([len(each) for each in arrays])
        self.left = np.minimum(tokens, context - self.lengths)
        self.whole = self.left == tokens  # or the context ends first
        self.seeds = [seeds] * len(arrays) if isinstance(seeds, int) else list(seeds)
        require(
            len(self.seeds) == len(arrays), f"{len(self.seeds)} seeds for {len(arrays)} prompts"
        )
        self.max_length = min(context, round_up(int((self.lengths + self.left).max()), LENGTHS))
        self.made: list[list[int]] = [[] for _ in arrays]
        self.ended: list[Ended | None] = [None for _ in arrays]
        self.compile_seconds = self.first_token_seconds = self.seconds = 0.0

    @property
    def copies(self) -> str:
        """What is to be said of copies of the cache that devices keep (`copies_said`)."""
        config, mesh = self.decoder.config, self.decoder.mesh
        kept = self.cache_type or config.dtype
        return copies_said(config, mesh, len(self.prompts), self.max_length, kept)

    def __iter__(self) -> Iterator[list[int | None]]:
        mesh, began = self.decoder.mesh, time.perf_counter()
        with jax.set_mesh(mesh):
            steps = self._tokens(self._warmed() if self.warm else self._empty())
        start = time.perf_counter()
        self.compile_seconds = start - began
        while not all(self.ended):
            with jax.set_mesh(mesh):
                tokens_B = next(steps)
            self.seconds = time.perf_counter() - start
            self.first_token_seconds = self.first_token_seconds or self.seconds
            yield [self._take(row, int(tokens_B[row])) for row in range(len(self.prompts))]

    def _take(self, row: int, token: int) -> int | None:
        """Token of a row, noted; None where its text has ended."""
        if self.ended[row] is not None:
            return None
        if token in self.stop:
            self.ended[row] = "stop"
            return None
        self.made[row].append(token)
        if len(self.made[row]) == self.left[row]:
            self.ended[row] = "tokens" if self.whole[row] else "context"
        return token

    @functools.cached_property
    def _padded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prompts, their lengths and seeds; rows that fill up the mesh repeat the first."""
        rows = round_up(len(self.prompts), self.decoder.mesh.shape["data"])
        order = [row if row < len(self.prompts) else 0 for row in range(rows)]
        longest = int(self.lengths.max())
        T = round_up(longest, LENGTHS if longest <= LENGTHS else CHUNK)
        tokens_BT = np.zeros((rows, T), np.int32)
        for row, source in enumerate(order):
            tokens_BT[row, : self.lengths[source]] = self.prompts[source]
        seeds = np.array([self.seeds[source] for source in order], np.int32)
        return tokens_BT, self.lengths[order].astype(np.int32), seeds

    def _empty(self) -> Cache:
        rows = len(self._padded[0])
        return empty_cache(self.decoder.config, rows, self.max_length, self.cache_type)

    def _warmed(self) -> Cache:
        """An empty cache, once all has been compiled, by tokens of which none counts."""
        tokens_BT, count_B, seed_B = self._padded
        d, none_B, cache = self.decoder, np.zeros_like(count_B), self._empty()
        for _ in range(2):  # the first time the arrays come from elsewhere
            logits_BV, new = read(d.config, d.parameters, cache, tokens_BT[:, :CHUNK], none_B)
            cache = write(d.config, cache, new, none_B)
            tokens_B = self._choose(logits_BV, seed_B, count_B)
            for _ in range(2):
                tokens_B, cache = self._advance(cache, tokens_B, seed_B, count_B, none_B)
        return jax.block_until_ready(cache)

    def _tokens(self, cache: Cache) -> Iterator[np.ndarray]:
        """The next token of each row, as many as any row may get; each is awaited while the one after is computed."""
        tokens_BT, count_B, seed_B = self._padded
        d, one_B = self.decoder, np.ones_like(count_B)
        logits_BV, cache = prefill(d.config, d.parameters, cache, tokens_BT, count_B)
        tokens_B = self._choose(logits_BV, seed_B, count_B)
        for at in range(1, int(self.left.max())):
            now = tokens_B
            tokens_B, cache = self._advance(cache, now, seed_B, count_B + at, one_B)
            yield np.asarray(now)
        yield np.asarray(tokens_B)

    def _choose(self, logits_BV: jax.Array, seed_B: np.ndarray, at_B: np.ndarray) -> jax.Array:
        return _choose(self.sampling, self.decoder.vocab_size, logits_BV, seed_B, at_B)

    def _advance(
        self,
        cache: Cache,
        tokens_B: jax.Array,
        seed_B: np.ndarray,
        at_B: np.ndarray,
        count_B: np.ndarray,
    ) -> tuple[jax.Array, Cache]:
        d = self.decoder
        tokens_B, new = next_tokens(
            d.config, self.sampling, d.vocab_size, d.parameters, cache, tokens_B, seed_B, at_B
        )
        return tokens_B, write(d.config, cache, new, count_B)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(
    sampling: Sampling,
    vocab_size: int,
    logits_BV: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
) -> jax.Array:
    known = jnp.arange(logits_BV.shape[-1]) < vocab_size
    tokens_B = choose(sampling, jnp.where(known, logits_BV, MASKED), seed_B, position_B)
    return constrain(tokens_B, None)  # whole on every process of a job


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def next_tokens(
    config: ModelConfig,
    sampling: Sampling,
    vocab_size: int,
    parameters: Parameters,
    cache: Cache,
    tokens_B: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
) -> tuple[jax.Array, New]:
    """The tokens after `tokens_B`, which are at the end of what the cache holds."""
    ones_B = jnp.ones_like(tokens_B)
    logits_BV, new = read(config, parameters, cache, tokens_B[:, None], ones_B)
    return _choose(sampling, vocab_size, logits_BV, seed_B, position_B), new
