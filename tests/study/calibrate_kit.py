"""Timings of machines whose rates are known."""

from dataclasses import replace
from itertools import product
from pathlib import Path

from gqa_scaling.config import ModelConfig
from gqa_scaling.costs import cache_bytes, decode_flops, prefill_flops, weight_bytes
from gqa_scaling.files.timings import Machine, Timing, Timings, write_timings
from gqa_scaling.study.calibrate import calibrate
from gqa_scaling.study.calibration import write_calibration

MACHINE = Machine("cpu", 1, 2e10, {"float32": 1e11}, 2**34)
SIZES = ((4, 256), (8, 512), (12, 768))
HEADS = ((8, 8), (8, 2), (8, 1), (16, 1), (4, 1))
CONTEXTS, BATCHES = (512, 2048, 8192), (1, 8)
RATES = {"weights": 2e10, "float32": 1.2e10, "int8": 4e9, "linear": 6e10, "attention": 3e10}
STEP, LAYER = 2e-4, 5e-5


def rows(
    phase="decode", cache="float32", sizes=SIZES, heads=HEADS, contexts=CONTEXTS, batches=BATCHES
):
    """Timings of these shapes, each of one second."""
    out = []
    for (layers, width), (h, kv), context, batch in product(sizes, heads, contexts, batches):
        model = ModelConfig(layers, width, h, kv, vocab_size=8192, dtype="float32")
        flops = (decode_flops if phase == "decode" else prefill_flops)(model, context, batch)
        read = weight_bytes(model) + cache_bytes(model, context, batch, cache)
        out.append(Timing(model, phase, context, batch, cache, 1.0, 0.0, 5, read, flops, read))
    return out


def timed(rows, seconds):
    return [replace(row, seconds=float(seconds(row))) for row in rows]


def parts(row):
    """Seconds of reading weights, of their products, of reading the cache and of attention, from the
    bytes and FLOPs that `costs` counts for a built model."""
    m, kept = row.model, row.cache
    empty = weight_bytes(m)
    attention = row.batch * 4 * row.context * m.n_layers * m.head_dim * m.n_heads
    return (
        empty / RATES["weights"],
        (row.flops - attention) / RATES["linear"],
        (row.bytes - empty) / RATES[kept],
        attention / RATES["attention"],
    )


def added(row):
    return STEP + LAYER * row.model.n_layers + sum(parts(row))


def longer(row):
    weights, linear, cache, attention = parts(row)
    return STEP + LAYER * row.model.n_layers + max(weights, linear) + max(cache, attention)


def written(folder: Path, rows) -> Path:
    path = folder / "timings.json"
    write_timings(path, Timings(MACHINE, tuple(rows), {"jax": "0.10"}, "test"))
    return path


def prefilled(row):
    """Seconds of prompts, from FLOPs alone."""
    m = row.model
    attention = 2 * row.batch * row.context**2 * m.n_layers * m.head_dim * m.n_heads
    return 1e-3 * m.n_layers + (row.flops - attention) / 8e10 + attention / 2e10


def calibrated_file(folder: Path) -> Path:
    """The calibration of a known machine, beside its timings; prefill with one cache alone."""
    decoding = timed([*rows(), *rows(cache="int8")], added)
    written(folder, [*decoding, *timed(rows("prefill"), prefilled)])
    path = folder / "calibration.json"
    write_calibration(path, calibrate(folder / "timings.json"))
    return path
