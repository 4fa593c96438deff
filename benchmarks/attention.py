"""Attention side by side: reference, blockwise, jax.nn's own, the platform's kernels, and sparse.

    python benchmarks/attention.py
    python benchmarks/attention.py --contexts 2048 8192 16384 --heads 2x4 1x8

For each context and head configuration (KV heads x query heads of each): milliseconds of the
forward pass and of forward and backward, temporary memory, seconds to compile, and how much faster
than the fastest dense attention that is, beside the ideal 1/density. Times are medians of samples that
take turns, so that a busy machine slows all alike; their ratios are what to trust. A sample is as many
calls in a row as last 5 ms, so that starting them does not count. What would build
all T x T scores stops at T = 2,048. float32 on a CPU, bfloat16 elsewhere. On a GPU cuDNN and the
Triton kernels are measured too, on a TPU splash.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from gqa_scaling.context_sharding import ContextSharding, density
from gqa_scaling.devices.host_memory import computes_on_cpu, ready_host_memory
from gqa_scaling.devices.kernel_limits import triton_limit
from gqa_scaling.model.attention import attend

QUADRATIC_UP_TO = 2048
SAMPLE_SECONDS = 0.005
KERNELS = {"gpu": ("triton", "cudnn"), "tpu": ("splash",)}


def jax_nn(q, k, v):
    B, T, K, G, H = q.shape
    return jax.nn.dot_product_attention(q.reshape(B, T, K * G, H), k, v, is_causal=True).reshape(
        q.shape
    )


def implementations(T, n_kv, args):
    """{name: (attention, density)}"""
    kernels, kind = KERNELS.get(jax.default_backend(), ()), jax.local_devices()[0].device_kind
    if "triton" in kernels and triton_limit(args.head_dim, None, None, kind):
        kernels = ("cudnn",)
    names, out = ("blockwise", *kernels), {}
    if T <= QUADRATIC_UP_TO:
        out["reference"] = functools.partial(attend, implementation="reference"), 1.0
        out["jax.nn"] = jax_nn, 1.0
    for name in names:
        out[name] = functools.partial(attend, implementation=name), 1.0
    for stride in args.strides if args.window < T else ():
        pattern = ContextSharding(args.block, args.window // args.block, stride).layers(1, n_kv)[0]
        for name in names:
            if name != "cudnn":  # dense only
                sparse = functools.partial(attend, patterns=(pattern,), implementation=name)
                out[f"{name} s{stride}"] = sparse, density([pattern], T)
    return out


def compiled(attention, operands):
    """The forward pass, forward and backward, MiB of temporaries and seconds to compile those."""

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v).astype(jnp.float32) ** 2)

    forward = jax.jit(attention).lower(*operands).compile()
    start = time.perf_counter()
    both = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*operands).compile()
    seconds = time.perf_counter() - start
    return forward, both, both.memory_analysis().temp_size_in_bytes / 2**20, seconds


def calls_of(f, operands):
    """How many calls in a row last as long as a sample; the first finds cold caches."""
    sample(f, operands, 1)
    calls = 1
    while sample(f, operands, calls) < SAMPLE_SECONDS:
        calls *= 2
    return calls


def sample(f, operands, calls):
    """Seconds that so many calls take."""
    start = time.perf_counter()
    jax.block_until_ready([f(*operands) for _ in range(calls)])
    return time.perf_counter() - start


def measure(T, n_kv, group, args):
    """One dictionary for each implementation."""
    dtype = jnp.float32 if computes_on_cpu() else jnp.bfloat16
    shapes = [(args.batch, T, n_kv, group, args.head_dim)] + [
        (args.batch, T, n_kv, args.head_dim)
    ] * 2
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [jax.random.normal(*x, dtype) for x in zip(keys, shapes, strict=True)]
    todo = implementations(T, n_kv, args)
    steps = {name: compiled(attention, operands) for name, (attention, _) in todo.items()}
    times = {(name, i): [] for name in steps for i in range(2)}
    calls = {(name, i): calls_of(steps[name][i], operands) for name, i in times}
    for _ in range(args.repeats):
        for name, i in times:
            seconds = sample(steps[name][i], operands, calls[name, i])
            times[name, i].append(seconds / calls[name, i] * 1e3)
    ms = {key: float(np.median(x)) for key, x in times.items()}
    dense = [name for name in steps if todo[name][1] == 1]
    forward, both = (min(ms[name, i] for name in dense) for i in range(2))
    return [
        {
            "T": T,
            "heads": f"{n_kv}x{group}",
            "name": name,
            "forward": ms[name, 0],
            "both": ms[name, 1],
            "MiB": steps[name][2],
            "compile": steps[name][3],
            "forward faster": forward / ms[name, 0],
            "faster": both / ms[name, 1],
            "ideal": 1 / todo[name][1],
        }
        for name in steps
    ]


COLUMNS = {
    "T": ">7,",
    "heads": ">6",
    "name": ">13",
    "forward": ">9.1f",
    "both": ">9.1f",
    "MiB": ">7.0f",
    "compile": ">8.1f",
    "forward faster": ">15.2f",
    "faster": ">7.2f",
    "ideal": ">6.2f",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--heads", nargs="+", default=["2x4"], help="KV heads x group, e.g. 2x4")
    parser.add_argument("--strides", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--window", type=int, default=512, help="tokens of the local window")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    ready_host_memory()
    print(" ".join(f"{name:{form.split('.')[0].rstrip(',')}}" for name, form in COLUMNS.items()))
    for heads in args.heads:
        n_kv, group = map(int, heads.split("x"))
        for T in args.contexts:
            for row in measure(T, n_kv, group, args):
                line = " ".join(f"{row[name]:{form}}" for name, form in COLUMNS.items())
                print(line, flush=True)


if __name__ == "__main__":
    main()
