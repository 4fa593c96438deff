"""Which mesh a run gets on a number of devices, told without any device; no jax."""

import math

from gqa_scaling.config import ModelConfig, ParallelConfig, require

AXES = ("data", "fsdp", "context", "tensor")


def axis_sizes(
    parallel: ParallelConfig, batch_size: int, model: ModelConfig, device_count: int
) -> tuple[int, int, int, int]:
    """Sizes of the mesh axes `AXES` on `device_count` devices, with `data=-1` resolved.

    `batch_size` counts the sequences of one microbatch. Raises `UserError`, naming the sizes
    that would do, when something cannot be divided. Needs no device.
    """
    fsdp, context, tensor = parallel.fsdp, parallel.context, parallel.tensor
    require(context == 1, f"context={context}: context parallelism is not built yet, use context=1")
    _divides("tensor", tensor, math.gcd(model.n_heads, model.n_kv_heads), "n_kv_heads")
    _divides("tensor", tensor, model.ffn_dim, "the FFN size")
    _divides("tensor", tensor, model.vocab_size, "vocab_size")
    _divides("fsdp", fsdp, model.d_model, "d_model")
    rest = fsdp * context * tensor
    if parallel.data == -1:
        require(
            device_count % rest == 0,
            f"fsdp={fsdp} x context={context} x tensor={tensor} must divide the {device_count} "
            f"devices: their product may be {_divisors(device_count)}",
        )
    data = device_count // rest if parallel.data == -1 else parallel.data
    require(
        data * rest == device_count,
        f"data={data} x fsdp={fsdp} x context={context} x tensor={tensor} = {data * rest} devices, "
        f"but there are {device_count}: data=-1 takes what the others leave over",
    )
    require(
        batch_size % (data * fsdp) == 0,
        f"data={data} x fsdp={fsdp} = {data * fsdp} must divide the {batch_size} sequences of a "
        f"microbatch: it may be {_divisors(batch_size)}",
    )
    return data, fsdp, context, tensor


def _divides(axis: str, size: int, total: int, what: str) -> None:
    require(
        total % size == 0,
        f"{axis}={size} must divide {what}={total}: it may be {_divisors(total)}",
    )


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
