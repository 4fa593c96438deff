import functools
import itertools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest
from flax import nnx
from jaxpr_flops import count_dot_flops

from gqa_scaling.config import ModelConfig
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.devices.mesh import RULES
from gqa_scaling.model import swiglu
from gqa_scaling.model.loss import next_token_loss, per_position_nll
from gqa_scaling.model.transformer import create

TINY = ModelConfig(2, 24, 4, 2, head_dim=8, vocab_size=40, dtype="float32")
STRIPES = ContextSharding(2, 1, stride=3, dense_layers="every 3")
HYBRID = replace(TINY, n_layers=4, pattern=STRIPES)  # layers: stripes, shifted, dense, shifted
VARIANTS = {
    "mha": replace(TINY, n_kv_heads=4),
    "gqa": TINY,
    "mqa with a window": replace(TINY, n_kv_heads=1, pattern=ContextSharding(3, 1)),
    "qk_norm, untied": replace(TINY, qk_norm=True, tie_embeddings=False, d_ff=40),
    "hybrid": HYBRID,
    "dense heads": replace(
        TINY, pattern=ContextSharding(2, 2, stride=4, sinks=1, dense_kv_heads=1)
    ),
}


def perturbed(config, seed=0):
    """A model whose norm scales are not all one."""
    graphdef, params = nnx.split(create(config, seed))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    leaves = [x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def as_numpy(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(params))


def batch(config, shape=(2, 11), seed=0):
    tokens = np.random.default_rng(seed).integers(config.vocab_size, size=(shape[0], shape[1] + 1))
    return tokens[:, :-1], tokens[:, 1:]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def loss_and_gradient(graphdef, params, x, y, remat="none", attention="blockwise"):
    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), x, y, remat=remat, attention=attention)

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_equations_in_numpy(config):
    model, (x, y) = perturbed(config), batch(config)
    params = as_numpy(nnx.state(model))
    want = numpy_transformer.logits(params, config, x)
    evaluate = lambda m: (m.logits(m(x)), per_position_nll(m, x, y), next_token_loss(m, x, y))  # noqa: E731
    got, got_nll, got_loss = jax.jit(evaluate)(model)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)
    nll = numpy_transformer.nll(params, config, x, y)
    np.testing.assert_allclose(got_nll, nll, rtol=0, atol=3e-5)
    np.testing.assert_allclose(got_loss, nll.mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qk_norm, untied", "hybrid"])
def test_gradient_equals_finite_differences_of_the_equations(name):
    config = VARIANTS[name]
    x, y = batch(config)
    graphdef, params = nnx.split(perturbed(config))
    _, gradient = loss_and_gradient(graphdef, params, x, y)
    at, gradient = as_numpy(params), as_numpy(gradient)
    rng = np.random.default_rng(1)
    step = 1e-5
    for leaf in (None, "gate_DF", "down_FD", "q_DKGH", "k_DKH", "attention_norm_D"):
        way = direction(at, leaf, rng)
        above, below = (mean_nll(at, sign * step, way, config, x, y) for sign in (1, -1))
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, w: (g * w).sum(), gradient, way)))
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-3, abs=1e-5)


def direction(params, leaf, rng):
    """Random numbers shaped like the parameters, zero outside `leaf` unless that is None."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: rng.normal(size=p.shape) * (leaf in (None, path[-1].key)), params
    )


def mean_nll(params, step, way, config, x, y):
    moved = jax.tree.map(lambda p, w: p + step * w, params, way)
    return numpy_transformer.nll(moved, config, x, y).mean()


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_no_position_sees_a_later_one(attention):
    config = VARIANTS["qk_norm, untied"]
    tokens = np.arange(12)[None]  # distinct, so that row s of the table is the input at s
    graphdef, params = nnx.split(create(config, 0))

    @jax.jit
    def gradient(params, t):
        hidden = lambda p: nnx.merge(graphdef, p)(tokens, attention=attention)[0, t].sum()  # noqa: E731
        return jax.grad(hidden)(params)["embedding_VD"][...]

    for t in (0, 5, 10):
        rows = np.abs(gradient(params, t)).sum(-1)
        assert (rows[: t + 1] > 0).all()
        assert (rows[t + 1 :] == 0).all()


def test_a_pattern_that_hides_nothing_is_the_dense_model():
    x, y = batch(TINY)
    params = nnx.state(create(TINY, 0))

    def program(pattern):
        graphdef = nnx.graphdef(create(replace(TINY, pattern=pattern), 0))
        loss = lambda p: next_token_loss(nnx.merge(graphdef, p), x, y)  # noqa: E731
        return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(jax.value_and_grad(loss))(params)))

    dense = program(None)
    assert program(ContextSharding(4, 3)) == dense
    assert program(ContextSharding(2, 1, stride=1)) == dense
    assert program(ContextSharding(4, 2)) != dense


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    """Of dense layers and sparse ones."""
    x, y = batch(HYBRID)
    graphdef, params = nnx.split(create(HYBRID, 0))
    loss, want = loss_and_gradient(graphdef, params, x, y)
    loss2, got = loss_and_gradient(graphdef, params, x, y, remat)
    assert float(loss2) == pytest.approx(float(loss), abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_remat_full_recomputes():
    x, y = batch(TINY)
    graphdef, params = nnx.split(create(TINY, 0))

    def flops(remat):
        f = lambda p: next_token_loss(  # noqa: E731
            nnx.merge(graphdef, p), x, y, remat=remat, attention="reference"
        )
        return count_dot_flops(jax.grad(f), params)

    assert flops("none") < flops("full")
    assert flops("none") <= flops("dots") < flops("full")


def test_bfloat16_stays_close_to_float32():
    high = VARIANTS["qk_norm, untied"]
    x, y = batch(high)
    losses, gradients = [], []
    for config in (high, replace(high, dtype="bfloat16")):
        graphdef, params = nnx.split(create(config, 0))
        loss, gradient = loss_and_gradient(graphdef, params, x, y)
        assert loss.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        losses.append(float(loss))
        gradients.append(jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient)]))
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    a, b = gradients
    assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(a)


def test_flops_are_those_of_the_formula():
    """2 FLOPs per matrix parameter and token forward, 4 backward; attention over all T x T."""
    c, (B, T) = replace(TINY, qk_norm=True), (2, 16)
    x, y = batch(c, (B, T))
    graphdef, params = nnx.split(create(c, 0))

    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), x, y, attention="reference")

    h, D, L = c.head_dim, c.d_model, c.n_layers
    matrices = L * (2 * D * h * (c.n_heads + c.n_kv_heads) + 3 * D * c.ffn_dim)
    forward = 2 * (matrices + c.vocab_size * D) * B * T + 4 * L * T * T * c.n_heads * h * B
    assert count_dot_flops(loss, params) == forward
    assert count_dot_flops(jax.grad(loss), params) == 3 * forward


SIZES = [(4, 256), (6, 512), (12, 768), (12, 1024), (16, 1024), (24, 1280), (24, 1536), (36, 1536)]
HEADS = [(h, kv) for h, kv in itertools.product([1, 2, 4, 8, 16, 32], repeat=2) if kv <= h]


def formula(c):
    per_layer = 2 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads) + 3 * c.d_model * c.ffn_dim
    per_layer += 2 * c.d_model + (2 * c.head_dim if c.qk_norm else 0)
    tables = 1 if c.tie_embeddings else 2
    return tables * c.vocab_size * c.d_model + c.n_layers * per_layer + c.d_model


def count(config):
    abstract = jax.eval_shape(lambda: nnx.state(create(config, 0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def test_parameter_counts_of_the_published_grid():
    """All heads at one size, and every size at the most unlike ones."""
    assert len(HEADS) == 21
    shapes = [(SIZES[0], heads) for heads in HEADS]
    shapes += [(size, heads) for size in SIZES[1:] for heads in ((32, 1), (8, 8))]
    for size, heads in shapes:
        config = ModelConfig(*size, *heads)
        assert count(config) == formula(config), (size, heads)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameter_counts_of_the_variants(config):
    assert count(config) == formula(config)


def test_creation_is_pure():
    leaves = [jax.tree.leaves(nnx.state(create(TINY, seed))) for seed in (0, 0, 1)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any((a != b).any() for a, b in zip(leaves[0], leaves[2], strict=True))
    assert {leaf.dtype for leaf in leaves[0]} == {jnp.dtype("float32")}


def test_every_parameter_names_its_axes():
    state = nnx.state(create(VARIANTS["qk_norm, untied"], 0))
    for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names = variable.get_metadata("out_sharding")
        assert len(names) == variable[...].ndim
        assert set(names) <= RULES.keys()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_untrained_loss_is_near_that_of_a_uniform_guess(tied):
    """Logits of unit variance: half a nat above a uniform guess."""
    config = ModelConfig(
        2, 64, 4, 2, head_dim=16, vocab_size=264, dtype="float32", tie_embeddings=tied
    )
    x, y = batch(config, (4, 64))
    loss = jax.jit(next_token_loss)(create(config, 0), x, y)
    assert float(loss) == pytest.approx(math.log(264) + 0.5, abs=0.2)


def test_the_traced_program_does_not_grow_with_depth():
    def size(n_layers):
        graphdef, params = nnx.split(create(replace(TINY, n_layers=n_layers), 0))
        x, y = batch(TINY)
        loss = lambda p: next_token_loss(nnx.merge(graphdef, p), x, y)  # noqa: E731
        return len(str(jax.make_jaxpr(jax.grad(loss))(params)).splitlines())

    assert size(2) == size(5)


def test_columns_that_are_added_to_gradients_are_taken_away(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (2, 3, 8), (8, 16), (8, 16), (16, 8)
    arrays = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

    def gradients():
        return jax.grad(lambda *xs: jnp.sum(swiglu.swiglu(*xs) ** 2), range(4))(*arrays)

    plain = gradients()
    monkeypatch.setattr(swiglu, "columns_to_scatter", lambda D, F: F + 8)
    for a, b in zip(plain, gradients(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
