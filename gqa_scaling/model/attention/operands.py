"""What the attention kernels ask of their operands."""

import jax

from gqa_scaling.context_sharding import HeadPattern


def check_operands(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    kind: HeadPattern | None,
    offset_K: jax.Array,
    starts: jax.Array,
) -> None:
    """Raises `ValueError`, in one line, where arrays and kind of pattern do not fit each other."""
    B, T, K, _, H = q_BTKGH.shape
    S = k_BSKH.shape[1]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != (B, S, K, H) or S % T:
        raise ValueError(
            f"keys {k_BSKH.shape} and values {v_BSKH.shape} must both be ({B}, S, {K}, {H}), S a "
            f"multiple of T={T}, for queries {q_BTKGH.shape}: gather positions and repeat KV heads "
            "before"
        )
    dtypes = {str(x.dtype) for x in (q_BTKGH, k_BSKH, v_BSKH)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        raise ValueError(
            f"queries, keys and values are {', '.join(sorted(dtypes))}: they must all be bfloat16 "
            "or all float32; cast them"
        )
    if kind is not None and not isinstance(kind, HeadPattern):
        raise ValueError(
            f"heads are given by a {type(kind).__name__}: it must be a HeadPattern, or None for "
            "dense ones; other implementations take more"
        )
    if kind is not None and kind.stride is not None and offset_K.shape != (K,):
        raise ValueError(f"offsets {offset_K.shape} must be one for each of {K} KV heads")
    parts = starts.size
    if parts > 2 or T % parts or (parts == 1 and S != T):
        raise ValueError(
            f"{T} queries of {S} positions cannot lie in {parts} equal runs: one run holds all "
            "positions, two are a device's share of them"
        )
