"""Decoding on this machine: bytes read for each token, and the time that takes.

    python benchmarks/decode.py [float32|bfloat16|int8 ...]

A model of 100M parameters with random weights, 8 query heads and 8 or 1 KV heads, decodes one token
at the end of a context. Bytes are those of the weights and of the cache that a token reads; the
bandwidth they are held against is measured in the same run: the sum of a large array, by as many
threads as there are cores. Times are medians over rounds that take turns, so that a busy moment
meets all alike; on a busy machine trust the ratios.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from gqa_scaling.config import ModelConfig
from gqa_scaling.devices.host_memory import computes_on_cpu, keep_host_memory
from gqa_scaling.hardware import cores
from gqa_scaling.inference import decode

MODEL = ModelConfig(12, 768, 8, 8, head_dim=64, vocab_size=32768)
KV_HEADS, BATCHES, CONTEXTS = (8, 1), (1, 8), (1024, 8192)
ROUNDS, STEPS = 5, 4


def bandwidth(array):
    """Bytes a second that the cores read together."""
    parts = np.array_split(array, len(cores()))
    with ThreadPoolExecutor(len(parts)) as threads:
        start = time.perf_counter()
        list(threads.map(np.sum, parts))
    return array.nbytes / (time.perf_counter() - start)


def bytes_read(parameters, cache):
    """Of weights and of the cache: all that a step reads but a row of the embedding."""
    weights = jax.tree.leaves(parameters._replace(embedding_VD=None))
    return sum(x.nbytes for x in weights), sum(x.nbytes for x in jax.tree.leaves(cache.layers))


class Case:
    """A model at the end of a context, ready to decode."""

    def __init__(self, config, parameters, batch, context, dtype):
        self.config, self.parameters = config, parameters
        self.cache = decode.empty_cache(config, batch, context, dtype)
        self.bytes = bytes_read(parameters, self.cache)
        self.end = jnp.full(batch, context - 1, jnp.int32)
        self.tokens = jnp.zeros(batch, jnp.int32)
        self.seconds = []
        self.step()

    def step(self):
        self.cache = dataclasses.replace(self.cache, length_B=self.end + 0)
        logits, self.cache = decode.step(self.config, self.parameters, self.cache, self.tokens)
        logits.block_until_ready()

    def measure(self):
        for _ in range(STEPS):
            start = time.perf_counter()
            self.step()
            self.seconds.append(time.perf_counter() - start)


def main(dtypes):
    if computes_on_cpu():
        keep_host_memory()
    large = np.ones(2**27, np.float32)
    config = decode.for_platform(MODEL)
    models = [dataclasses.replace(config, n_kv_heads=n) for n in KV_HEADS]
    parameters = {model: decode.random_parameters(model) for model in models}
    title = f"{'cache':9}{'batch':>6}{'context':>8}{'KV':>4}{'weights MB':>12}{'cache MB':>10}"
    print(f"{title}{'ms':>8}{'GB/s':>7}{'of measured':>13}{'tokens/s':>10}{'ratio':>7}{'bytes':>7}")
    for dtype, batch, context in itertools.product(dtypes, BATCHES, CONTEXTS):
        cases = [Case(m, parameters[m], batch, context, dtype) for m in models]
        speeds = []
        for _ in range(ROUNDS):
            speeds.append(bandwidth(large))
            for case in cases:
                case.measure()
        speed = statistics.median(speeds)
        times = [statistics.median(case.seconds) for case in cases]
        for case, seconds in zip(cases, times, strict=True):
            weights, held = case.bytes
            rate, ratio = (weights + held) / seconds, times[0] / seconds
            of_bytes = sum(cases[0].bytes) / (weights + held)
            print(
                f"{dtype:9}{batch:6}{context:8}{case.config.n_kv_heads:4}{weights / 1e6:12.0f}"
                f"{held / 1e6:10.0f}{seconds * 1e3:8.2f}{rate / 1e9:7.1f}{rate / speed:13.0%}"
                f"{batch / seconds:10.1f}{ratio:7.2f}{of_bytes:7.2f}",
                flush=True,
            )
        del cases
        print(f"{'':9}measured {speed / 1e9:.1f} GB/s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["float32"])
