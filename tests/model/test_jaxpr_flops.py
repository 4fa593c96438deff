import jax
import jax.numpy as jnp
import pytest
from jaxpr_flops import count_dot_flops

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
ONE = 2 * 3 * 5 * 7


def test_one_product_and_its_gradient():
    assert count_dot_flops(jnp.dot, A, B) == ONE
    assert count_dot_flops(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), (0, 1)), A, B) == 3 * ONE


def test_batch_dimensions_count_once():
    x = jnp.ones((2, 4, 3, 5))
    assert count_dot_flops(lambda x: jnp.einsum("bhqd,bhkd->bhqk", x, x), x) == 2 * 8 * 3 * 3 * 5


def test_descends_into_loops_branches_and_rules():
    @jax.custom_vjp
    def f(a):
        return a @ B

    f.defvjp(lambda a: (f(a), None), lambda _, g: (g @ B.T,))
    square = jnp.ones((5, 5))

    def body(x, _):
        return jax.checkpoint(lambda x: x @ square)(x), None

    assert count_dot_flops(jax.jit(f), A) == ONE
    assert count_dot_flops(jax.grad(lambda a: f(a).sum()), A) == 2 * ONE
    assert count_dot_flops(lambda x: jax.lax.scan(body, x, None, length=4), A) == 4 * 2 * 3 * 25
    # forward, recomputed, one gradient
    loss = jax.grad(lambda x: jnp.sum(jax.lax.scan(body, x, None, length=4)[0] ** 2))
    assert count_dot_flops(loss, A) in (2 * 4 * 2 * 3 * 25, 3 * 4 * 2 * 3 * 25)
    branch = lambda p: jax.lax.cond(p, lambda: A @ B, lambda: jnp.zeros((3, 7)))  # noqa: E731
    assert count_dot_flops(branch, True) == ONE


def test_a_loop_of_unknown_length_is_refused():
    loop = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="while"):
        count_dot_flops(loop, jnp.ones((2, 2)))
