"""Which mesh and which attention a run gets on its devices, and which positions each holds.

All of it is arithmetic without jax or any device, so that a plan can refuse what would fail on a pod.
"""

import math
from dataclasses import replace
from typing import Any

from gqa_scaling.config import (
    EvaluationConfig,
    Implementation,
    ModelConfig,
    RunConfig,
    UserError,
    require,
)
from gqa_scaling.devices.kernel_limits import KERNEL_PLATFORM, kernel_limit
from gqa_scaling.fields import round_up

AXES = ("data", "fsdp", "context", "tensor")


def axis_sizes(run: RunConfig, device_count: int) -> tuple[int, int, int, int]:
    """Sizes of the mesh axes `AXES` on `device_count` devices, with `data=-1` resolved.

    Raises `UserError`, naming the sizes that would do, when something cannot be divided: the
    sequences of a microbatch over `data` x `fsdp`, positions over twice `context` (zig-zag halves),
    d_model over `fsdp` x `context`, and query heads, FFN and vocabulary over `tensor`. KV heads
    fewer than `tensor` are repeated. `context` must not cut the blocks of a pattern, and
    `tensor` must divide the KV heads that stay dense in its sparse layers.
    """
    p, m = run.parallel, run.model
    fsdp, context, tensor = p.fsdp, p.context, p.tensor
    pattern = m.pattern if m.pattern and m.pattern.hides(run.context_length) else None
    _divides(f"tensor={tensor}", tensor, m.n_heads, f"n_heads={m.n_heads}")
    require(
        m.n_kv_heads % tensor == 0 or tensor % m.n_kv_heads == 0,
        f"tensor={tensor} must divide n_kv_heads={m.n_kv_heads} or be a multiple of it, and divide "
        f"n_heads={m.n_heads}: it may be {_among(_tensor_sizes(m.n_heads, m.n_kv_heads))}",
    )
    _divides(f"tensor={tensor}", tensor, m.ffn_dim, f"the FFN size={m.ffn_dim}")
    _divides(f"tensor={tensor}", tensor, m.vocab_size, f"vocab_size={m.vocab_size}")
    if context > 1:
        T = run.context_length
        require(
            T % (2 * context) == 0,
            f"context={context} must divide half of context_length={T}, as each device holds two "
            f"parts of a sequence: it may be {_among(_divisors(T // 2) if T % 2 == 0 else [1])}",
        )
        block = pattern.block if pattern else 1
        require(
            T // (2 * context) % block == 0,
            f"context={context} cuts {T} positions into parts of {T // (2 * context)}, which must be "
            f"a multiple of pattern.block={block}",
        )
    if pattern and pattern.dense_kv_heads:
        require(
            pattern.dense_kv_heads % tensor == 0,
            f"tensor={tensor} must divide pattern.dense_kv_heads={pattern.dense_kv_heads}, so that "
            f"all devices have the same work: it may be {_among(_divisors(pattern.dense_kv_heads))}",
        )
    _divides(
        f"fsdp={fsdp} x context={context} = {fsdp * context}",
        fsdp * context,
        m.d_model,
        f"d_model={m.d_model}",
    )
    rest = fsdp * context * tensor
    if p.data == -1:
        require(
            device_count % rest == 0,
            f"fsdp={fsdp} x context={context} x tensor={tensor} must divide the {device_count} "
            f"devices: their product may be {_among(_divisors(device_count))}",
        )
    data = device_count // rest if p.data == -1 else p.data
    require(
        data * rest == device_count,
        f"data={data} x fsdp={fsdp} x context={context} x tensor={tensor} = {data * rest} devices, "
        f"but there are {device_count}: data=-1 takes what the others leave over",
    )
    rows = run.batch_size // p.accumulation
    require(
        rows % (data * fsdp) == 0,
        f"data={data} x fsdp={fsdp} = {data * fsdp} must divide the {rows} sequences of a "
        f"microbatch: it may be {_among(_divisors(rows))}; more devices go to context or tensor",
    )
    return data, fsdp, context, tensor


def serving_tensor(model: ModelConfig, devices: int) -> int:
    """Over how many of the devices a model's heads, FFN and vocabulary can be divided, at the most.

    KV heads fewer than that are repeated; those that a pattern leaves dense are shared out equally.
    """
    dense = model.pattern.dense_kv_heads if model.pattern else 0
    sizes = _tensor_sizes(model.n_heads, model.n_kv_heads)
    wholes = model.ffn_dim, model.vocab_size, dense, devices
    return max(size for size in sizes if all(whole % size == 0 for whole in wholes))


def attention_implementation(run: RunConfig, platform: str, device: str = "") -> Implementation:
    """The attention that a run gets on devices of a platform, "cpu", "gpu" or "tpu", and of the
    `device_kind` that jax tells, where they are at hand.

    "auto" is blockwise on a CPU, splash on a TPU and, on a GPU, cudnn for dense models in bfloat16
    and triton for others; where such a kernel cannot take the run, blockwise, which can do all.
    Raises `UserError` where the run asks for one that the platform, the model, its context length
    or its layout rules out.
    """
    wanted = run.parallel.attention
    if wanted != "auto" and wanted not in KERNEL_PLATFORM:
        return wanted
    if wanted != "auto":
        reason = _unfit(wanted, run, platform, device)
        require(
            not reason, f"attention={wanted} {reason}: take auto, or blockwise, which runs anywhere"
        )
        return wanted
    kernels: dict[str, tuple[Implementation, ...]] = {
        "tpu": ("splash",),
        "gpu": ("cudnn", "triton"),
    }
    fit = [name for name in kernels.get(platform, ()) if not _unfit(name, run, platform, device)]
    return fit[0] if fit else "blockwise"


def judged_at(run: RunConfig, length: int, devices: int) -> RunConfig:
    """The run as it is judged at another context length: in batches of as many tokens as one of its
    microbatches, or of one sequence for each part of the batch axes where that is more."""
    data, fsdp, _, _ = axis_sizes(run, devices)
    tokens = run.batch_tokens // run.parallel.accumulation
    rows = round_up(max(1, tokens // length), data * fsdp)
    return replace(
        run,
        context_length=length,
        batch_tokens=rows * length,
        tokens=rows * length,
        tokens_per_param=None,
        evaluation=EvaluationConfig(tokens=length),
        parallel=replace(run.parallel, accumulation=1),
    )


def check_layout(run: RunConfig, devices: int, platform: str, device: str) -> None:
    """Refuse, by the run's name, what `layout_refusal` names."""
    reason = layout_refusal(run, devices, platform, device)
    require(not reason, f"{run.name}: {reason}")


def layout_refusal(run: RunConfig, devices: int, platform: str, device: str = "") -> str:
    """Why the run cannot be laid out over so many devices of a platform, or cannot have the attention
    that it asks for there, also at the other contexts that its loss is measured at; "" where it can."""
    judged = ""
    try:
        axis_sizes(run, devices)
        attention_implementation(run, platform, device)
        for length in run.evaluation.contexts:
            judged = f"judged at {length} tokens: "
            at_length = judged_at(run, length, devices)
            axis_sizes(at_length, devices)
            attention_implementation(at_length, platform, device)
    except UserError as error:
        return f"{judged}{error}"
    return ""


def _unfit(name: str, run: RunConfig, platform: str, device: str) -> str:
    """Why a kernel cannot serve this run; "" where it can."""
    m, needed = run.model, KERNEL_PLATFORM[name]
    if platform != needed:
        return f"needs a {needed.upper()}, and this is a {platform.upper()}"
    kinds = {replace(h, offset=0) if h else None for layer in m.layer_patterns for h in layer}
    return kernel_limit(
        name,
        kinds,
        T=run.context_length,
        context=run.parallel.context,
        head_dim=m.head_dim,
        dtype=m.dtype,
        device=device,
    )


def zigzag(positions_T: Any, context: int) -> Any:
    """`positions_T`, a numpy or jax array, in the order in which `context` devices hold them.

    Of 2 x `context` equal parts device i holds parts i and 2 x `context` - 1 - i, so that under a
    causal mask all have the same number of keys to read.
    """
    if context == 1:
        return positions_T
    import numpy as np  # here: costs are counted, and experiments declared, without arrays

    order = np.ravel([(i, 2 * context - 1 - i) for i in range(context)])
    return positions_T.reshape(2 * context, -1)[order].reshape(-1)


def _divides(name: str, size: int, total: int, what: str) -> None:
    """Refuse a `size`, written as `name`, that does not divide a `total`, written as `what`."""
    require(total % size == 0, f"{name} must divide {what}: it may be {_among(_divisors(total))}")


def _tensor_sizes(n_heads: int, n_kv_heads: int) -> list[int]:
    """Sizes of the tensor axis that a model's heads can be divided over."""
    return [i for i in _divisors(n_heads) if n_kv_heads % i == 0 or i % n_kv_heads == 0]


def _divisors(n: int) -> list[int]:
    low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def _among(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
