"""What the attention kernels ask of their operands."""

import jax

from gqa_scaling.context_sharding import HeadPattern, LayerPattern


def check_operands(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, pattern: LayerPattern
) -> None:
    """Raises `ValueError`, in one line, where arrays and pattern do not fit each other."""
    B, T, K, _, H = q_BTKGH.shape
    if k_BSKH.shape != (B, T, K, H) or v_BSKH.shape != (B, T, K, H):
        raise ValueError(
            f"keys {k_BSKH.shape} and values {v_BSKH.shape} must both be {(B, T, K, H)} for queries "
            f"{q_BTKGH.shape}: gather positions and repeat KV heads before"
        )
    dtypes = {str(x.dtype) for x in (q_BTKGH, k_BSKH, v_BSKH)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        raise ValueError(
            f"queries, keys and values are {', '.join(sorted(dtypes))}: they must all be bfloat16 "
            "or all float32; cast them"
        )
    if len(pattern) != K:
        raise ValueError(
            f"a pattern of {len(pattern)} heads must have one for each of {K} KV heads"
        )
    for head in pattern:
        if head is not None and not isinstance(head, HeadPattern):
            raise ValueError(
                f"a head is given by a {type(head).__name__}: it must be a HeadPattern, or None for "
                "a dense one; other implementations take more"
            )
