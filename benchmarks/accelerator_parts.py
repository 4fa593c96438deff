"""What `accelerator.py` checks and measures, one function for each part; each returns rows.

A row that is a check has `limit` beside `found`: it is right where found is below. Others are
measurements. Every part can be run alone, in a process of its own; `small` shrinks it to what a CPU
does in a second or two, by the same code.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gqa_scaling.config import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.costs import training_flops_per_token
from gqa_scaling.devices import mesh as parallel
from gqa_scaling.devices.host_memory import computes_on_cpu
from gqa_scaling.devices.kernel_limits import kernel_limit
from gqa_scaling.hardware import cores, detected
from gqa_scaling.model.attention import attend
from gqa_scaling.sweep.memory import training_bytes
from gqa_scaling.training.setup import set_up
from gqa_scaling.training.step import initial_state, train_step

# The norm of an error over the norm of what is right; of the worst row, over that of the mean row.
# bfloat16 keeps 8 bits: one rounding is an error of 0.002, and gradients are rounded several times.
ALL, WORST = {"float32": 2e-5, "bfloat16": 0.01}, {"float32": 1e-3, "bfloat16": 0.2}
# Of training for twenty steps: losses apart, in nats.
LOSSES = {"float32": 2e-3, "bfloat16": 0.05}
# Of the first moments of one step, which are a gradient: norm of the error over the norm.
GRADIENTS = {"float32": 1e-4, "bfloat16": 0.02}
HEADS, STEPS = 8, 20
SIZES = {  # Chen et al. 2025: L, d, query heads, KV heads
    "150M": (12, 1024, 16, 4),
    "470M": (24, 1280, 20, 5),
    "1.2B": (36, 1536, 24, 8),
}
PATTERN = ContextSharding(64, 16, stride=16, dense_layers="every 2")
STEP_TOKENS, ACCUMULATIONS = 2**16, (1, 2, 4, 8)
WARM, TIMED = 2, 5


def kernels():
    """The kernels of this platform, and what runs anywhere."""
    platform = jax.default_backend()
    return {"gpu": ("triton", "cudnn"), "tpu": ("splash",)}.get(platform, ()) + ("blockwise",)


# -------------------------------------------------------------------------------------- right


def doctor(small):
    """What `gqa-scaling doctor` says of the machine."""
    command = [sys.executable, "-m", "gqa_scaling", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr.strip()[-500:])
    found = json.loads(done.stdout)
    rows = [{"what": "problems", "found": len(found["problems"]), "limit": 0.5}]
    rows[0]["note"] = "; ".join(found["problems"])
    for fault in found["faults"]:
        seen = f"{fault['shown']['seen']}; {fault['hit']['seen']}"
        rows.append(
            {"what": fault["name"], "note": seen, "found": int(fault["wrong"]), "limit": 0.5}
        )
    for speed in found["speeds"]:
        rows.append({"what": speed["name"], "rate": speed["measured"], "share": speed["share"]})
    facts = [fact for fact in found["machine"] if fact["name"] in ("devices", "driver", "jaxlib")]
    return rows + [{"what": fact["name"], "note": fact["value"]} for fact in facts]


def attention(small):
    """Every kernel against all T x T scores in float32 on the host's CPU, forward and backward."""
    T = 80 if small else 1000  # no multiple of a tile
    sparse = (
        ContextSharding(16, 1, stride=2) if small else ContextSharding(64, 2, stride=4, sinks=1)
    )
    cases = itertools.product(
        (16,) if small else (64, 128),
        ("float32",) if small else ("float32", "bfloat16"),
        (2,) if small else (1, 2, 4, HEADS),
        (("dense", None), ("pattern", sparse)),
    )
    with ThreadPoolExecutor(min(8, len(cores()))) as threads:  # compiling takes most of the time
        found = threads.map(lambda case: _kernels_against_reference(T, *case), cases)
        return [row for rows in found for row in rows]


def _kernels_against_reference(T, head_dim, dtype, n_kv, named):
    name, pattern = named
    layer = pattern.layers(1, n_kv)[0] if pattern else (None,) * n_kv
    kinds = {dataclasses.replace(head, offset=0) if head else None for head in layer}
    names = [
        kernel
        for kernel in kernels()
        if kernel == "blockwise"
        or not kernel_limit(
            kernel, kinds, T=T, context=1, head_dim=head_dim, dtype=dtype,
            device=jax.local_devices()[0].device_kind,
        )
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    q_shape, k_shape = (2, T, n_kv, HEADS // n_kv, head_dim), (2, T, n_kv, head_dim)
    operands = [
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in (q_shape, k_shape, k_shape, q_shape)
    ]
    host = jax.local_devices(backend="cpu")[0]
    exact = [jax.device_put(x.astype(jnp.float32), host) for x in operands]
    right = _forward_and_backward("reference", layer)(*exact)
    rows = []
    for kernel in names:
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            found = _forward_and_backward(kernel, layer)(*operands)
        errors = [_errors(x, y) for x, y in zip(found, right, strict=True)]
        case = f"{kernel}, {name}, d_h {head_dim}, {n_kv} of {HEADS} heads, {dtype}"
        rows += [
            {"what": case, "found": max(e[0] for e in errors), "limit": ALL[dtype]},
            {
                "what": f"{case}, worst row",
                "found": max(e[1] for e in errors),
                "limit": WORST[dtype],
            },
        ]
    return rows


def _forward_and_backward(implementation, layer):
    @jax.jit
    def both(q, k, v, do):
        call = functools.partial(attend, patterns=(layer,), implementation=implementation)
        o, back = jax.vjp(call, q, k, v)
        return o, *back(do)

    return both


def _errors(found, right):
    """Norms of the error, of all and of the worst row; infinite where a value is no number."""
    found, right = (np.asarray(x, np.float64) for x in (found, right))
    rows = np.linalg.norm(found - right, axis=-1)
    whole = np.linalg.norm(right)
    error, worst = np.linalg.norm(rows) / whole, rows.max() / (whole / np.sqrt(rows.size))
    return [float(x) if np.isfinite(x) else float("inf") for x in (error, worst)]


def _run(small, dtype="float32", steps=STEPS, **parallel_fields):
    """A small model with a pattern, on text that can be learned."""
    T, d = (64, 32) if small else (512, 256)
    pattern = ContextSharding(16, 1 if small else 4, stride=2, dense_layers="every 2")
    return RunConfig(
        name="check",
        model=ModelConfig(
            2, d, 4, 2, head_dim=16 if small else 64, vocab_size=264, dtype=dtype, pattern=pattern
        ),
        context_length=T,
        batch_tokens=8 * T,
        tokens=steps * 8 * T,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        parallel=ParallelConfig(data=1, **parallel_fields),
        evaluation=EvaluationConfig(tokens=T),
    )


def _tokens(run, step):
    """(inputs, targets): each token is the one before plus a small step, most of the time."""
    rng = np.random.default_rng(step)
    moves = rng.integers(1, 4, (run.batch_size, run.context_length + 1))
    tokens = ((moves.cumsum(1) + rng.integers(0, 256, (run.batch_size, 1))) % 256).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def _trained(run, steps, device):
    """Losses of each step, and the state after them."""
    setup = set_up(run, [device])
    with jax.set_mesh(setup.mesh):
        state = parallel.create_sharded(functools.partial(initial_state, setup), setup.mesh)
        step, losses = train_step(setup), []
        for i in range(steps):
            batch = [jax.device_put(x, device) for x in _tokens(run, i)]
            state, metrics = step(state, *batch)
            losses.append(float(metrics.loss))
        return losses, jax.device_get(state)


def steps(small):
    """Twenty steps on the device and on the CPU of the host, losses side by side."""
    rows, count = [], 3 if small else STEPS
    device, host = jax.local_devices()[0], jax.local_devices(backend="cpu")[0]
    for dtype in ("float32",) if small else ("float32", "bfloat16"):
        found, right = (
            _trained(_run(small, dtype, count), count, where)[0] for where in (device, host)
        )
        apart = float(np.abs(np.subtract(found, right)).max())
        note = f"{right[0]:.3f} to {found[-1]:.3f} and {right[-1]:.3f} nats"
        what = f"{count} steps against the CPU, {dtype}"
        limit = LOSSES[dtype]
        rows.append({"what": what, "found": _number(apart), "limit": limit, "note": note})
    return rows


def gradients(small):
    """The gradient of one step, by its first moments, with accumulation and remat and without."""
    device, rows = jax.local_devices()[0], []
    for dtype in ("float32",) if small else ("float32", "bfloat16"):
        _, (_, plain) = _trained(_run(small, dtype), 1, device)
        changes = [{"accumulation": 4}, {"remat": "dots"}, {"remat": "full", "accumulation": 2}]
        for change in changes[2:] if small else changes:
            _, (_, moments) = _trained(_run(small, dtype, **change), 1, device)
            error = _apart(plain, moments)
            what = ", ".join(f"{key} {value}" for key, value in change.items())
            what = f"gradients with {what}, {dtype}"
            rows.append({"what": what, "found": error, "limit": GRADIENTS[dtype]})
    return rows


def _apart(plain, other):
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True)
    errors = [
        np.linalg.norm(np.subtract(b, a, dtype=np.float64)) / max(np.linalg.norm(a), 1e-30)
        for a, b in pairs
        if np.ndim(a)
    ]
    return _number(float(max(errors)))


def _number(x):
    return x if np.isfinite(x) else float("inf")


RESUMED = """
from pathlib import Path
from gqa_scaling.config import *

def runs():
    model = ModelConfig(2, {d}, 4, 2, head_dim=16, vocab_size=264, dtype="{dtype}")
    corpus = str(Path(__file__).parent / "corpus")
    return [RunConfig(name="resumed", model=model, data=DataConfig(corpus=corpus, tokenizer="bytes"),
            context_length=128, batch_tokens=2048, tokens={steps} * 2048,
            evaluation=EvaluationConfig(tokens=2048), checkpoint=CheckpointConfig(every_steps=20))]
"""


def resume(small):
    """A run that is told to stop in the middle ends in the same result, to the last digit."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "corpus").mkdir()
        rng = np.random.default_rng(0)
        words = [f"{rng.integers(10**4)} " for _ in range(500)]
        for i in range(20):
            text = "".join(rng.choice(words, 4000))
            (place / f"corpus/{i}.txt").write_text(text)
        # jax must not start here: it would take the memory that the runs need
        dtype = "float32" if computes_on_cpu() else "bfloat16"
        steps = 60 if small else 1000
        text = RESUMED.format(d=32 if small else 256, dtype=dtype, steps=steps)
        (place / "resumed.py").write_text(text)
        require_code(_gqa("prepare", place, "whole").wait(), 0, "preparing its text")
        require_code(_gqa("run", place, "whole").wait(), 0, "the run that is left alone")
        cut = _gqa("run", place, "cut")
        while cut.poll() is None and not list(place.glob("cut/**/checkpoints/[1-9]*")):
            time.sleep(0.01)
        cut.send_signal(signal.SIGTERM)
        require_code(cut.wait(), 75, "the run that is told to stop")
        require_code(_gqa("run", place, "cut").wait(), 0, "its second start")
        results = [_result(place / name) for name in ("whole", "cut")]
    same = results[0] == results[1]
    what = "resumed with deterministic operations: loss apart"
    losses = [next(iter(result["evaluations"].values()))["loss"] for result in results]
    found = 0.0 if same else max(abs(losses[0] - losses[1]), 1e-12)
    return [{"what": what, "found": found, "limit": 1e-15, "note": f"{losses[0]!r}"}]


def _gqa(verb, place, root):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    return subprocess.Popen(
        [sys.executable, "-m", "gqa_scaling", verb, "resumed.py", "--root", root],
        cwd=place,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
    )


def _result(root):
    (path,) = root.glob("**/result.json")
    return json.loads(path.read_text())["result"]


def require_code(found, wanted, what):
    if found != wanted:
        raise RuntimeError(f"{what} ended with {found}, not {wanted}")


# --------------------------------------------------------------------------------------- fast


def speed(small, head_dim=64):
    """Attention forward, and forward and backward, in milliseconds (benchmarks/attention.py)."""
    from attention import measure

    args = argparse.Namespace(
        strides=[2] if small else [16], window=64 if small else 1024, block=64, batch=1,
        head_dim=16 if small else head_dim, repeats=2 if small else 10,
    )  # fmt: skip
    rows = []
    for T in (256,) if small else (2048, 8192, 32768):
        for row in measure(T, 2 if small else 8, 2 if small else 3, args):
            what = f"{row['name']}, T {T:,}, d_h {args.head_dim}, heads {row['heads']}"
            keep = {k: row[k] for k in ("forward", "both", "faster", "ideal", "MiB")}
            rows.append({"what": what, **keep})
    return rows


def speed_run(small, size="150M", context=8192, remat="dots", pattern=False):
    """What `training` times, whole steps of at least `STEP_TOKENS`."""
    L, d, n_h, n_kv = (2, 32, 4, 2) if small else SIZES[size]
    T, tokens = (64, 256) if small else (context, max(STEP_TOKENS, context))
    shape = {"head_dim": 16, "vocab_size": 264} if small else {"head_dim": 64, "vocab_size": 50304}
    return RunConfig(
        name="speed",
        model=ModelConfig(L, d, n_h, n_kv, pattern=PATTERN if pattern else None, **shape),
        context_length=T,
        batch_tokens=tokens,
        tokens=100 * tokens,
        parallel=ParallelConfig(remat=remat, data=1),
        evaluation=EvaluationConfig(tokens=T),
    )


def training(small, size="150M", context=8192, remat="dots", pattern=False):
    """Tokens a second, MFU and memory of the real step. MFU: model FLOPs with causal attention
    counted once (`costs.training_flops_per_token`), nothing that is recomputed, over the peak."""
    run = speed_run(small, size, context, remat, pattern)
    T, tokens = run.context_length, run.batch_tokens
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    what = f"{'small' if small else size}, T {T:,}, remat {remat}" + (
        ", pattern" if pattern else ""
    )
    run = fitting(run, device.platform, stats.get("bytes_limit"))
    if run is None:
        return [{"what": what, "note": "does not fit"}]
    setup = set_up(run, [device])
    with jax.set_mesh(setup.mesh):
        state = parallel.create_sharded(functools.partial(initial_state, setup), setup.mesh)
        batch = [jax.device_put(x, device) for x in _tokens(run, 0)]
        began = time.perf_counter()
        step = train_step(setup).lower(state, *batch).compile()
        compiled, seconds = time.perf_counter() - began, []
        for i in range(WARM + (2 if small else TIMED)):
            start = time.perf_counter()
            state, metrics = step(state, *batch)
            loss = float(metrics.loss)
            if i >= WARM:
                seconds.append(time.perf_counter() - start)
    rate = tokens / float(np.median(seconds))
    many, rows = run.parallel.accumulation, run.batch_size // run.parallel.accumulation
    row = detected(device.device_kind)
    flops = training_flops_per_token(run.model, T)
    stats = device.memory_stats() or {}
    return [
        {
            "what": f"{what}, {setup.attention}",
            "tokens_per_second": rate,
            "mfu": rate * flops / row.peak_flops if row and device.platform != "cpu" else None,
            "GiB": stats.get("peak_bytes_in_use", 0) / 2**30,
            "compile": compiled,
            "note": f"accumulation {many}, {rows} sequences at a time, loss {loss:.2f}",
        }
    ]


def fitting(run, platform, limit):
    """The run with the least accumulation that `limit` bytes are predicted to have room for; None
    where all need more. A CPU names no limit."""
    for many in ACCUMULATIONS:
        if run.batch_size % many == 0:
            axes = dataclasses.replace(run.parallel, accumulation=many)
            cut = dataclasses.replace(run, parallel=axes)
            if limit is None or training_bytes(cut, 1, platform).total < limit:
                return cut
    return None


DECODED = ("24,8@L36d1536", "8,1@L36d2048", "--contexts", "8192", "--batches", "1", "16")


def decode(small, output):
    """Prefill and decoding of two models, by the verb that times them and keeps its rows in `output`
    as it goes."""
    cases = ("2,1@L2d64", "--contexts", "32", "--batches", "1") if small else DECODED
    words = ("bench-inference", *cases, "--output", str(output), "--json")
    command = [sys.executable, "-m", "gqa_scaling", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    rows = []
    for row in json.loads(done.stdout)["rows"]:
        m, asked = row["model"], f"T {row['context']:,}, batch {row['batch']}, {row['cache']} cache"
        model = f"{m['n_heads']},{m['n_kv_heads']}@L{m['n_layers']}d{m['d_model']}"
        tokens = row["batch"] * (row["context"] if row["phase"] == "prefill" else 1)
        found = {"what": f"{row['phase']} of {model}, {asked}", "note": row["skipped"] or ""}
        if not row["skipped"]:
            found |= {"ms": 1e3 * row["seconds"], "tokens_per_second": tokens / row["seconds"]}
        rows.append(found)
    return rows
