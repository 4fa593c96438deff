"""Held-out loss: mean next-token cross-entropy in nats, and bits per byte."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gqa_scaling.config import RunConfig
from gqa_scaling.data import TokenStore
from gqa_scaling.data.loader import evaluation_hash, heldout_chunks
from gqa_scaling.layout import attention_implementation
from gqa_scaling.model.loss import per_position_nll
from gqa_scaling.parallel import BatchLayout, platform_of


@dataclass(frozen=True)
class Evaluation:
    """Loss on the evaluation stream, whose hash tells which targets these were."""

    loss: float
    bits_per_byte: float
    targets: int
    hash: str
    context_length: int


def evaluator(
    run: RunConfig, graph: nnx.GraphDef, store: TokenStore, mesh: jax.sharding.Mesh
) -> Callable[[Any], Evaluation]:
    """A function from parameters to the loss on the run's evaluation stream, compiled once.

    Each target counts once. Batches are as large as a training microbatch, the last one filled up
    with a repeated row that is not counted. Sums are taken on the host in float64, in order.
    """
    longest = run.evaluation_context
    chunks = heldout_chunks(store, run.context_length, run.evaluation.tokens, longest)
    stream = evaluation_hash(store, run.evaluation.tokens, longest)
    rows = run.batch_size // run.parallel.accumulation  # a batch this size is known to fit
    targets = len(chunks) * run.context_length

    layout = BatchLayout(mesh, rows, run.context_length)
    attention = attention_implementation(run, platform_of(mesh))

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def nll(parameters: Any, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        model = nnx.merge(graph, parameters)
        nll_BT = per_position_nll(model, inputs_BT, targets_BT, attention=attention)
        return nll_BT.sum(1)

    def evaluate(parameters: Any) -> Evaluation:
        total = 0.0
        for start in range(0, len(chunks), rows):
            index = np.arange(start, start + rows).clip(max=len(chunks) - 1)
            tokens = [
                chunks[index[of.start : of.stop], time.start : time.stop + 1]
                for of, time in layout.pieces
            ]
            sums = np.asarray(nll(parameters, *layout.place(tokens)), np.float64)
            total += float(sums[: len(chunks) - start].sum())
        loss = total / targets
        bits = loss / math.log(2) / store.heldout_bytes_per_token
        return Evaluation(loss, bits, targets, stream, run.context_length)

    return evaluate
