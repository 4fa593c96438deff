"""Held-out loss: mean next-token cross-entropy in nats, and bits per byte."""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gqa_scaling.data import TokenStore
from gqa_scaling.data.loader import evaluation_hash, heldout_chunks
from gqa_scaling.devices.layout import zigzag
from gqa_scaling.devices.mesh import BatchLayout
from gqa_scaling.model.einsum import full_precision
from gqa_scaling.model.loss import per_position_nll
from gqa_scaling.text import NeedleForm
from gqa_scaling.training.setup import Setup, at_length

POSITION_PARTS = 32  # of the context, for which losses are told apart
# What is measured during training, where a run does not say how often: the last of the points is the
# result itself. Together they cost no more than this share of the training, on two cores as on a pod.
POINTS = 8
SHARE = 0.02
READ_TWICE = 2**14  # targets of what is read twice, or those of a batch where that is more


@dataclass(frozen=True)
class Found:
    """Which share of needles was found: for each length of the text one `accuracy` for each of the
    `depths`, over `trials` prompts."""

    form: NeedleForm
    trials: int
    depths: tuple[float, ...]
    accuracy: dict[str, list[float]]


@dataclass(frozen=True)
class Evaluation:
    """Loss on the evaluation stream, whose hash tells which targets these were.

    `loss_by_position` are means over parts of the context, as equal as can be, first positions first.
    `loss_of_first_reading` is that of some of the held-out text in the first half of the context,
    `loss_of_second_reading` that of the same targets when the second half repeats the first: a model that
    copies from its context (Olsson et al. 2022, arXiv 2209.11895) knows what comes. None for a context too
    short to repeat in.
    `loss_by_context` are losses on the same targets with the text cut into other context lengths.
    """

    loss: float
    bits_per_byte: float
    targets: int
    hash: str
    context_length: int
    loss_by_position: tuple[float, ...] = ()
    loss_of_first_reading: float | None = None
    loss_of_second_reading: float | None = None
    loss_by_context: dict[str, float] | None = None
    needles: Found | None = None

    def measures(self) -> dict[str, float]:
        """What is worth a curve over the steps: the loss, and what a second reading gains, in nats."""
        told = {"evaluation/loss": self.loss}
        first, second = self.loss_of_first_reading, self.loss_of_second_reading
        if first is not None and second is not None:
            told["evaluation/gained_by_rereading"] = first - second
        return told

    def to_dict(self) -> dict[str, Any]:
        """As result.json has it: what was not asked for is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def is_measured(setup: Setup, step: int) -> bool:
    """Whether the loss is measured after this step, counted from 1, while the run trains."""
    every = setup.run.evaluation.every_steps or -(-setup.steps // POINTS)
    return step % every == 0 and step < setup.steps


def targets_of_a_point(setup: Setup) -> int | None:
    """How many targets one such measurement may take; None for all, as where a run says how often.

    A target costs a third of what training on a token does, and as many again are read twice.
    """
    if setup.run.evaluation.every_steps:
        return None
    return math.floor(SHARE * 3 / 2 * setup.tokens / (POINTS - 1))


def evaluator(
    setup: Setup, store: TokenStore, context: int | None = None
) -> Callable[..., Evaluation]:
    """A function from parameters to the loss on the run's evaluation stream, compiled once.

    Its second argument is how many targets to measure at most, spread evenly over the stream, though
    never less than a batch; None: all. The stream is cut into the run's context length, or into another
    `context`, where nothing is read twice: the same targets, each counted once. Batches are as large as a training microbatch, the last one filled up
    with a repeated row that is not counted. Sums are taken on the host in float64, in order.
    """
    judged, mesh, longest = setup.run.evaluation, setup.mesh, setup.run.evaluation_context
    if context is not None:
        setup = at_length(setup, context)
    run = setup.run
    chunks = heldout_chunks(store, run.context_length, judged.tokens, longest)
    stream = evaluation_hash(store, judged.tokens, longest)
    rows = run.batch_size // run.parallel.accumulation  # a batch this size is known to fit

    layout = BatchLayout(mesh, rows, run.context_length)
    order = zigzag(np.arange(run.context_length), mesh.shape["context"])

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def nll(
        parameters: Any, rows_left: int, inputs_BT: jax.Array, targets_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Summed over positions, (B,), and over the rows that count, (T,)."""
        model = nnx.merge(setup.graph, parameters)
        with full_precision(run.model.dtype):
            nll_BT = per_position_nll(model, inputs_BT, targets_BT, attention=setup.attention)
        counted = jnp.arange(rows)[:, None] < rows_left
        return nll_BT.sum(1), jnp.where(counted, nll_BT, 0).sum(0)

    def losses(parameters: Any, chunks: np.ndarray, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        """Summed over all targets of the chosen chunks; a mean for each position, (T,)."""
        total, by_position, count = 0.0, np.zeros(run.context_length), len(chosen)
        for start in range(0, count, rows):
            index = chosen[np.arange(start, start + rows).clip(max=count - 1)]
            tokens = [
                chunks[index[of.start : of.stop], time.start : time.stop + 1]
                for of, time in layout.pieces
            ]
            left = count - start
            sums, column_sums = jax.device_get(nll(parameters, left, *layout.place(tokens)))
            total += float(sums[:left].sum(dtype=np.float64))
            by_position[order] += column_sums
        return total, by_position / count

    def evaluate(parameters: Any, most: int | None = None) -> Evaluation:
        chosen = _spread(chunks, rows, most)
        total, by_position = losses(parameters, chunks, chosen)
        targets = len(chosen) * run.context_length
        loss = total / targets
        bits = loss / math.log(2) / store.heldout_bytes_per_token
        parts = np.array_split(by_position, min(POSITION_PARTS, run.context_length))
        means = tuple(float(part.mean()) for part in parts)
        value = Evaluation(loss, bits, targets, stream, run.context_length, means)
        half = run.context_length // 2
        if context is not None or half < 2:
            return value
        some = _spread(chunks, rows, min(READ_TWICE, most or READ_TWICE))
        text = chunks[some, :half]
        twice = np.concatenate([text, text, text[:, :2]], axis=1)[:, : run.context_length + 1]
        _, by_position = losses(parameters, twice, np.arange(len(some)))
        readings = by_position[: half - 1], by_position[half : 2 * half - 1]
        first, second = (float(reading.mean()) for reading in readings)
        return replace(value, loss_of_first_reading=first, loss_of_second_reading=second)

    return evaluate


def _spread(chunks: np.ndarray, rows: int, most: int | None) -> np.ndarray:
    """Indices of chunks with at most so many targets, but at least a batch of `rows`; None: all."""
    count = len(chunks)
    if most is not None:
        count = min(count, max(rows, most // (chunks.shape[1] - 1)))
    return np.linspace(0, len(chunks) - 1, count).round().astype(int)
