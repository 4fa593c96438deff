"""Memory and disk that a run needs, predicted from shapes alone: no device, no compiler."""

import math
from dataclasses import dataclass

from gqa_scaling.config import RunConfig, round_up
from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.costs import LOGIT_BYTES, parameters
from gqa_scaling.devices.kernel_limits import LANES
from gqa_scaling.devices.layout import attention_implementation

# Shares by which arrays lie apart. Only programs for TPUs were compiled and compared.
TPU_GAPS, OTHER_GAPS = 0.03, 0.2
TPU_PROGRAM_BYTES = 32 * 2**20
TILE_ROWS = 8  # fp32 arrays lie in TPU memory in tiles of 8 rows
# What is bought for a run must hold this much more than predicted: on TPUs the prediction is up to
# 3% low (docs/pods.md).
SAFETY = 1.1


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes that one device holds while training, predicted from shapes alone.

    Always there are `state` (parameters and moments), `casts` (the layers' weights in the compute
    dtype), `accumulated` (gradients summed over microbatches) and `program`, the code. On top of
    them lies what the step holds where it holds most, which is one of three moments:

    - when the loss is known: the `activations` kept for the backward pass, and `output`, which is
      the tables of the vocabulary and a chunk of logits;
    - in the backward pass of a layer: activations, `gradients`, and what that `layer` works with;
    - at the end: gradients and `sums`, those of the embedding table before devices have shared
      them out.

    `gaps` is the share by which the arrays of that moment lie apart.
    """

    state: int
    casts: int
    accumulated: int
    gradients: int
    activations: int
    output: int
    layer: int
    sums: int
    program: int
    gaps: float

    @property
    def total(self) -> int:
        """Bytes of all of it where it is most."""
        at_the_loss = self.activations + self.output
        in_a_layer = self.activations + self.gradients + self.layer
        most = max(at_the_loss, in_a_layer, self.gradients + self.sums)
        always = self.state + self.casts + self.accumulated + self.program
        return always + round(most * (1 + self.gaps))


def training_bytes(run: RunConfig, devices: int = 1, platform: str = "cpu") -> TrainingBytes:
    """Predicted bytes on one of `devices` of a platform ("cpu", "gpu" or "tpu").

    The terms are the arrays of the step that `run` takes, as found in the buffers of steps compiled
    for TPUs (docs/pods.md). fp32 parameters and two moments (12 bytes a parameter) and gradients (4,
    twice that when accumulating) are shared by the fsdp, context and tensor axes. Tokens are shared
    by all axes but tensor, which shares heads, FFN and vocabulary. The weights of one layer are whole
    while it works; its attention reads the keys and values of whole sequences, and makes their
    gradients in fp32. Layers of a pattern work one after another in the same memory, so that the
    one that needs most counts.

    Raises UserError where the platform does not have the attention that the run asks for.
    """
    m, p, axes = run.model, parameters(run.model), run.parallel
    implementation = attention_implementation(run, platform)
    width = 2 if m.dtype == "bfloat16" else 4
    ways = axes.fsdp * axes.context
    tokens = run.batch_tokens / axes.accumulation * axes.tensor / devices
    D, L, F = m.d_model, m.n_layers, m.ffn_dim / axes.tensor
    heads = m.n_heads / axes.tensor
    q = heads * m.head_dim
    kv = m.n_kv_heads * m.head_dim / min(axes.tensor, m.n_kv_heads)
    scores = 4 * tokens * run.context_length * heads if implementation == "reference" else 0

    around = 4 * D + 2 * q + 2 * kv  # values of a token: norms, both sums, attention in and out
    kept = {"full": D, "dots": 2 * D + q + 2 * kv + 2 * F, "none": around + 2 * F}[axes.remat]
    sums_of_scores = 4 * heads if axes.remat == "none" else 0  # their logarithms, in fp32
    activations = L * tokens * (width * kept + sums_of_scores)
    activations += 0 if axes.remat == "full" else L * scores

    again = 0 if axes.remat == "none" else tokens * width
    ffn = again * (around + 2 * F) + 4 * tokens * width * F
    ffn += 3 * D * F * (width + 4)  # weights and their gradients
    attention = again * around + 3 * scores
    if implementation != "reference":  # K and V as tiles; their gradients as tiles and as rows,
        lanes = round_up(m.head_dim, LANES) if platform == "tpu" else m.head_dim
        rows = width * m.head_dim / lanes  # which have positions in their lanes
        each = max(
            sum(width * tiles + 4 * tiles + rows for tiles in (_tiles(h, run) for h in layer))
            for layer in set(m.layer_patterns)
        )
        attention += tokens * axes.context * 2 * kv * lanes / m.head_dim * each / m.n_kv_heads
        attention += 4 * tokens * heads * lanes * width  # q, o and their gradients, head by head
        if implementation == "splash":  # sums of scores and of gradients, a row of lanes for each
            attention += 2 * tokens * heads * LANES * 4

    tables, shards, rows = p.embedding / axes.tensor, ways * axes.tensor, D / ways
    logits = min(LOGIT_BYTES, 4 * tokens * m.vocab_size / axes.tensor)
    # the table for the embedding and for logits; its gradient as a sum and as what is added to it
    output = (2 * width + 2 * 4) * tables + logits + 2 * tokens * D * width
    padded = round_up(rows, TILE_ROWS) / rows if ways > 1 else 1
    gradients = 4 * p.total / shards * padded
    return TrainingBytes(
        state=math.ceil(12 * p.total / shards * padded),
        casts=math.ceil(width * p.non_embedding / shards * padded) if width < 4 else 0,
        accumulated=math.ceil(gradients) if axes.accumulation > 1 else 0,
        gradients=math.ceil(gradients),
        activations=math.ceil(activations),
        output=math.ceil(output),
        layer=math.ceil(max(ffn, attention)),
        sums=math.ceil(3 * 4 * tables),
        program=TPU_PROGRAM_BYTES if platform == "tpu" else 0,
        gaps=TPU_GAPS if platform == "tpu" else OTHER_GAPS,
    )


def _tiles(head: HeadPattern | None, run: RunConfig) -> float:
    """How many keys attention lays out for a head, as a share of those of the sequence.

    All of them for the window of near keys and, beside them, the distant ones that the head sees.
    """
    T = run.context_length
    return 1.0 if head is None else 1 + (head.slots(T) - min(T, head.window)) / T


def state_bytes(run: RunConfig) -> int:
    """Disk that one checkpoint takes: fp32 parameters and moments."""
    return 12 * parameters(run.model).total


def checkpoint_bytes(run: RunConfig) -> int:
    """Disk that a run needs while it trains: its checkpoints."""
    return (run.checkpoint.keep + run.evaluation.average) * state_bytes(run)


def finished_bytes(run: RunConfig) -> int:
    """Disk that a finished run keeps: fp32 parameters, and the mean over its last states if asked."""
    return (4 if run.evaluation.average == 1 else 8) * parameters(run.model).total
