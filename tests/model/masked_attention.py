"""What all attention is held to: every T x T score, masked token by token, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCES = (2e-6, 2e-5, 2e-5, 2e-5)  # of the output and of the gradients of q, k and v


def visible(head, T):
    """Whether query t sees key s, at [t, s]: the words of arXiv 2407.17678, and nothing else."""
    t, s = np.arange(T)[:, None], np.arange(T)
    if head is None:
        return s <= t
    i, j = t // head.block, s // head.block
    distant = j < head.sinks
    if head.stride is not None:
        distant = distant | ((j + head.offset) % head.stride == 0)
    return (s <= t) & ((i - j < head.local) | distant)


def masked(q_BTKGH, k_BSKH, v_BSKH, heads, do_BTKGH=None):
    """Output of attention by heads that each have a pattern; with do its gradients too."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTKGH, k_BSKH, v_BSKH))
    scale = q.shape[-1] ** -0.5
    mask = np.stack([visible(head, q.shape[1]) for head in heads])[None, :, None]
    scores = np.where(mask, np.einsum("BTKGH,BSKH->BKGTS", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum("BKGTS,BSKH->BTKGH", weights, v)
    if do_BTKGH is None:
        return o
    do = np.asarray(do_BTKGH, np.float64)
    dweights = np.einsum("BTKGH,BSKH->BKGTS", do, v)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
    dq = np.einsum("BKGTS,BSKH->BTKGH", dscores, k)
    dk = np.einsum("BKGTS,BTKGH->BSKH", dscores, q)
    return o, dq, dk, np.einsum("BKGTS,BTKGH->BSKH", weights, do)


def operands(B, T, K, G, H, seed=0, dtype="float32"):
    """q, k, v and a gradient of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def both(attend, q, k, v, do):
    """Output and gradients."""
    o, pull_back = jax.vjp(attend, q, k, v)
    return o, *pull_back(do)


def differences(got, wanted):
    """The largest difference of each pair of arrays. Of values above 1, such as the gradient of a
    sink that all queries see, relative ones."""
    pairs = [(np.asarray(x, np.float64), y) for x, y in zip(got, wanted, strict=True)]
    return [float((np.abs(x - y) / np.maximum(1, np.abs(y))).max()) for x, y in pairs]


def assert_equals_masked(attend, shape, *layers, seed=0):
    """`attend(layer, q, k, v)`, output and gradients, in each of several layers, for (B, T, G, H) of
    `shape`; the layer is traced."""
    B, T, G, H = shape
    xs = operands(B, T, len(layers[0]), G, H, seed)
    found = jax.jit(lambda layer, *xs: both(lambda *qkv: attend(layer, *qkv), *xs))
    for layer, heads in enumerate(layers):
        *qkv, do = xs
        found_here = differences(found(layer, *xs), masked(*qkv, heads, do))
        np.testing.assert_array_less(found_here, TOLERANCES)
