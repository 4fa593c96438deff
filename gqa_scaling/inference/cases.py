"""What `bench-inference` times: which models, at which contexts and batches, and what these need.

What does not fit is known by arithmetic, before anything is allocated.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gqa_scaling.config import ModelConfig, between, require
from gqa_scaling.costs import VALUE_BYTES, cache_bytes, parameters, weight_bytes
from gqa_scaling.devices.layout import serving_tensor
from gqa_scaling.experiment.ladder import TRAINED_SIZES
from gqa_scaling.fields import INT32_MAX
from gqa_scaling.files.timings import CacheName
from gqa_scaling.inference.cache import TILE
from gqa_scaling.inference.decode import CHUNK
from gqa_scaling.units import byte_size

FITS = 0.9  # of the free memory: the estimates are not exact
TOGETHER = 0.5  # of it, for cases that take turns: freed memory of a CPU lies in pieces
MOST_BATCH = 2**20

Batch = int | Literal["max"]  # "max": as many sequences as fit


@dataclass(frozen=True)
class Case:
    """A model with a cache for `batch` sequences of `context` tokens; prefill and decoding are timed.

    Cases of one `group` differ in model and cache alone, and take turns where memory has room for them.
    """

    model: ModelConfig
    context: int
    batch: int
    cache: CacheName
    group: tuple[int, Batch]


@dataclass(frozen=True)
class Grid:
    """Every one of the models at every context and batch, with every type of cache."""

    models: tuple[ModelConfig, ...]
    contexts: tuple[int, ...]
    batches: tuple[Batch, ...]
    caches: tuple[CacheName, ...]

    def __post_init__(self) -> None:
        for context in self.contexts:
            between("context", context, 2, INT32_MAX, "tokens")  # positions are int32
        for batch in self.batches:
            require(
                batch == "max" or 0 < batch <= MOST_BATCH,
                f"batch={batch} must be max, or a number of sequences from 1 to {MOST_BATCH:,}",
            )

    def cases(self, memory_bytes: int, devices: int = 1) -> list[Case]:
        """Those of a group together, in the order of contexts and batches."""
        out = []
        for context, batch in itertools.product(self.contexts, self.batches):
            for model, cache in itertools.product(self.models, self.caches):
                many = (
                    most_that_fits(model, context, cache, memory_bytes, devices)
                    if batch == "max"
                    else batch
                )
                out.append(Case(model, context, many, cache, (context, batch)))
        return out


def cases_of(grids: Iterable[Grid], memory_bytes: int, devices: int = 1) -> list[Case]:
    """The cases of several grids, each once."""
    found: dict[tuple, Case] = {}
    for grid in grids:
        for case in grid.cases(memory_bytes, devices):
            found.setdefault((case.model, case.context, case.batch, case.cache), case)
    return list(found.values())


def default_grids(platform: str) -> list[Grid]:
    """What is timed where nothing is asked for: minutes on a CPU, an hour or so on an accelerator.

    On an accelerator first the published pair at 128K with ever larger batches (Chen et al. 2025,
    section 5), then the 8 sizes that the paper trained, with Llama 3's heads and with (8, 1).
    """
    if platform == "cpu":
        models = tuple(
            ModelConfig(L, d, 8, n_kv_heads, dtype="float32")
            for L, d in ((4, 256), (6, 512), (12, 768))
            for n_kv_heads in (8, 1)
        )
        return [
            Grid(models, (1024, 8192), (1, 8), ("float32",)),
            Grid(models[-2:], (8192,), (8,), ("float32", "bfloat16", "int8")),
        ]
    pair = ModelConfig(36, 1536, 32, 8), ModelConfig(36, 2048, 8, 1)
    ladder: list[ModelConfig] = []
    for size in TRAINED_SIZES:
        shape, heads = (size.n_layers, size.d_model), size.d_model // 64
        ladder.append(ModelConfig(*shape, heads, math.gcd(heads, 8)))
        ladder.append(ModelConfig(*shape, min(8, heads), 1))
    return [
        Grid(pair, (131072,), (1, 4, 16, 64, "max"), ("bfloat16",)),
        Grid(pair, (131072,), (16,), ("bfloat16", "int8")),
        Grid(tuple(ladder), (8192, 131072), (1, 16), ("bfloat16",)),
    ]


def default_batches(platform: str) -> tuple[Batch, ...]:
    """Sequences at a time, where models or an experiment are named."""
    return (1, 8) if platform == "cpu" else (1, 16, "max")


# -------------------------------------------------------------------------------- what they need


def held_bytes(case: Case, devices: int = 1) -> int:
    """Bytes that weights and cache take up, on all devices together.

    The embedding lies there once more as the output matrix. Each of the `shares` has all weights, and
    where devices share heads fewer than they are, each has a copy of these.
    """
    tables = table_bytes(case.model) * shares(case.model, devices)
    return tables + read_bytes(case, devices)


def read_bytes(case: Case, devices: int = 1) -> int:
    """What of them a step that decodes reads."""
    cached = cache_bytes(case.model, case.context, case.batch, case.cache)
    weights = weight_bytes(case.model) * shares(case.model, devices)
    return weights + cached * copies(case.model, devices)


def shares(model: ModelConfig, devices: int) -> int:
    """Parts of the devices that share out the sequences, each with a whole model."""
    return devices // serving_tensor(model, devices)


def copies(model: ModelConfig, devices: int) -> int:
    """How often each KV head is kept: more than once where it serves several devices."""
    return max(1, serving_tensor(model, devices) // model.n_kv_heads)


def table_bytes(model: ModelConfig) -> int:
    """Bytes of the embedding, of which a step reads a row for each sequence."""
    return VALUE_BYTES[model.dtype] * parameters(model).embedding


def working_bytes(case: Case) -> int:
    """A bound on what prefill or a step holds beside weights and cache, on all devices together.

    The arrays of one layer, scores in float32, the logits, and those of all chunks of a prompt; a
    cache once more where bf16 is kept and float32 computed in, and a layer of one in int8.
    """
    m, width = case.model, VALUE_BYTES[case.model.dtype]
    chunk = min(CHUNK, case.context)
    tokens = case.batch * chunk
    logits = 4 * case.batch * m.vocab_size * (2 * -(-case.context // chunk) + 2)
    heads = m.head_dim * (m.n_heads + 2 * m.n_kv_heads)
    layer = tokens * (4 * (m.d_model + heads) + 3 * width * m.ffn_dim + 4 * 3 * m.d_model)
    new = 2 * m.n_layers * tokens * width * m.n_kv_heads * m.head_dim
    scores = 3 * 4 * case.batch * m.n_heads * max(case.context, chunk * TILE)
    cast = 4 * case.batch * 2 * case.context * m.n_kv_heads * m.head_dim
    cast *= {m.dtype: 0, "int8": 1}.get(case.cache, m.n_layers)
    return logits + layer + new + scores + cast


def needed_bytes(case: Case, devices: int = 1) -> int:
    """Bytes that a case needs by arithmetic, on all devices together."""
    return held_bytes(case, devices) + working_bytes(case)


def most_that_fits(
    model: ModelConfig, context: int, cache: CacheName, memory_bytes: int, devices: int = 1
) -> int:
    """The largest batch, a multiple of what shares its sequences out, that memory has room for; at
    least one such multiple."""
    parts = shares(model, devices)

    def fits(multiple: int) -> bool:
        case = Case(model, context, multiple * parts, cache, (context, "max"))
        return needed_bytes(case, devices) <= FITS * memory_bytes

    low, high = 1, MOST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * parts


def unfit(case: Case, free_bytes: int, devices: int = 1) -> str | None:
    """Why a case cannot be timed on devices with so much free memory; None where it can."""
    parts = shares(case.model, devices)
    if case.batch % parts:
        return f"{parts} parts of the devices cannot share out {case.batch} sequences equally"
    needed, room = needed_bytes(case, devices), round(FITS * free_bytes)
    if needed > room:
        return f"needs about {byte_size(needed)} and there is room for {byte_size(room)}"
    return None


def packs(cases: Sequence[Case], free_bytes: int, devices: int, most: int) -> list[list[Case]]:
    """Cases that take turns: of one group, at most so many, and together within half the memory."""
    out: list[list[Case]] = []
    for case in cases:
        last = out[-1] if out else []
        together = [*last, case]
        alike = bool(last) and last[0].group == case.group and len(together) <= most
        if alike and _together(together, devices) <= TOGETHER * free_bytes:
            last.append(case)
        else:
            out.append([case])
    return out


def _together(cases: Sequence[Case], devices: int) -> int:
    weights = {case.model: held_bytes(replace(case, batch=0), devices) for case in cases}
    caches = (held_bytes(case, devices) - weights[case.model] for case in cases)
    return sum(weights.values()) + sum(caches) + max(map(working_bytes, cases))
