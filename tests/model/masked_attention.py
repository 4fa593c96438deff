"""What the attention kernels are held to: all T x T scores, masked token by token, in float32."""

import jax
import jax.numpy as jnp
import numpy as np


def visible(head, T):
    """Whether query t sees key s, at [t, s]."""
    t, s = np.arange(T)[:, None], np.arange(T)
    if head is None:
        return s <= t
    return (s <= t) & np.asarray(head.visible(t // head.block, s // head.block))


def masked(q_BTKGH, k_BSKH, v_BSKH, mask_KTS):
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * q_BTKGH.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask_KTS[None, :, None], scores, -1e30), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)


def operands(B, T, K, G, H, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def assert_equals_masked(attend, shape, pattern, seed=0):
    """`attend(q, k, v)` and its gradients, for (B, T, G, H) of `shape`."""
    B, T, G, H = shape
    mask = np.stack([visible(head, T) for head in pattern])

    @jax.jit
    def both(q, k, v, weight, mask):
        o, pull_back = jax.vjp(attend, q, k, v)
        o2, pull_back2 = jax.vjp(lambda *x: masked(*x, mask), q, k, v)
        return (o, *pull_back(weight)), (o2, *pull_back2(weight))

    found, wanted = both(*operands(B, T, len(pattern), G, H, seed), mask)
    for x, y, atol in zip(found, wanted, (2e-6, 2e-5, 2e-5, 2e-5), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)
