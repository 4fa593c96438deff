import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gqa_scaling.config import ModelConfig
from gqa_scaling.model import loss
from gqa_scaling.model.transformer import create

CONFIG = ModelConfig(1, 16, 2, 1, head_dim=8, vocab_size=50, dtype="float32")
TOKENS = np.random.default_rng(0).integers(50, size=(3, 14))
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]


def value_and_gradient(chunk, tie=True):
    config = ModelConfig(**{**CONFIG.to_dict(), "tie_embeddings": tie})
    graphdef, params = nnx.split(create(config, 0))

    def chunked(params):
        return 3 * loss.next_token_loss(nnx.merge(graphdef, params), X, Y, chunk=chunk)

    def plain(params):
        model = nnx.merge(graphdef, params)
        logits = model.logits(model(X))
        return 3 * optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    both = jax.jit(lambda p: [jax.value_and_grad(f)(p) for f in (chunked, plain)])
    return both(params)


@pytest.mark.parametrize(("chunk", "tie"), [(None, True), (4, True), (1, False)])
def test_chunks_change_neither_value_nor_gradient(chunk, tie):
    (value, gradient), (want, want_gradient) = value_and_gradient(chunk, tie)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient,
        want_gradient,
    )


def test_logits_never_exceed_their_allowance(monkeypatch):
    """The automatic chunk keeps every array of the traced step below the allowance."""
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * 15 * 50)
    graphdef, params = nnx.split(create(CONFIG, 0))
    f = lambda p: loss.next_token_loss(nnx.merge(graphdef, p), X, Y)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(f))(params))
    assert "f32[15,50]" in text
    assert "f32[39,50]" not in text
    per_position = jax.jit(loss.per_position_nll)(nnx.merge(graphdef, params), X, Y)
    assert per_position.shape == Y.shape
    assert per_position.dtype == jnp.float32
    assert float(per_position.mean()) == pytest.approx(float(jax.jit(f)(params)), rel=1e-6)
