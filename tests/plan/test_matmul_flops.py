"""The FLOPs of the matmuls of a traced function."""

import jax
import jax.numpy as jnp
import pytest

from jax_lora.plan.matmul_flops import matmul_flops

X = jnp.ones((2, 3))
W = jnp.ones((3, 3))
ONE = 2 * (2 * 3 * 3)


def flops(f, *args):
    return matmul_flops(jax.make_jaxpr(f)(*args).jaxpr)


@pytest.mark.parametrize(
    ("f", "times"),
    [
        (lambda x: x + 1.0, 0),
        (lambda x: x @ W, 1),
        (lambda x: jax.jit(lambda y: y @ W)(x), 1),
        (lambda x: jax.checkpoint(lambda y: jnp.sin(y @ W))(x), 1),
        (lambda x: jax.lax.scan(lambda y, _: (y @ W, None), x, length=5)[0], 5),
        (lambda x: jax.lax.while_loop(lambda y: y.sum() < 9.0, lambda y: y @ W, x), 1),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda y: y @ W @ W, lambda y: y @ W, x), 2),
    ],
)
def test_every_matmul_counts_with_its_loop(f, times):
    assert flops(f, X) == times * ONE


def test_nested_scans_multiply():
    def inner(y, _):
        return jax.lax.scan(lambda z, _: (z @ W, None), y, length=3)[0], None

    assert flops(lambda x: jax.lax.scan(inner, x, length=4)[0], X) == 12 * ONE


def test_batch_and_contracted_axes_count():
    a, b = jnp.ones((5, 2, 3, 7)), jnp.ones((5, 3, 7, 4))
    assert flops(lambda a, b: jnp.einsum("btij,bijo->bto", a, b), a, b) == 2 * 5 * 2 * 4 * 21


def test_full_rematerialization_adds_a_forward_pass():
    def loss(w, f):
        return jnp.sum(f(X, w))

    layer = lambda x, w: jnp.sin(jnp.sin(x @ w) @ w)  # noqa: E731
    gradient = lambda f: flops(lambda w: jax.grad(loss)(w, f), W)  # noqa: E731
    assert gradient(jax.checkpoint(layer)) > gradient(layer)
