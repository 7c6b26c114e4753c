"""Loops over 16-bit weights on a CPU convert one layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.plan.compiled_step import memory_of
from jax_lora.transform.low_memory_jit import low_memory_jit

LAYERS, WIDTH = 16, 64
STACK = LAYERS * WIDTH * WIDTH  # elements


def forward(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def arguments(dtype):
    return jnp.full((LAYERS, WIDTH, WIDTH), 0.1, dtype), jnp.ones((8, WIDTH), dtype)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPU")
def test_a_bfloat16_stack_has_no_float32_copy():
    compiled = low_memory_jit(forward).lower(*arguments(jnp.bfloat16)).compile()
    memory = memory_of(compiled)
    assert memory is not None and memory.temporary < STACK  # a copy has 4 bytes per element


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_result_is_that_of_jit(dtype):
    inputs = arguments(dtype)
    found, expected = low_memory_jit(forward)(*inputs), jax.jit(forward)(*inputs)
    np.testing.assert_array_equal(found, expected)


def test_it_works_inside_other_transformations():
    weights, x = arguments(jnp.bfloat16)
    inner = low_memory_jit(forward)
    expected = inner(weights, x)
    np.testing.assert_array_equal(jax.jit(lambda x: inner(weights, x))(x), expected)
    np.testing.assert_array_equal(jax.jit(lambda: inner(weights, x))(), expected)
    gradient = jax.grad(lambda x: inner(weights, x).sum().astype(jnp.float32))(x)
    assert gradient.shape == x.shape
    assert jax.vmap(inner, (None, 0))(weights, x[None]).shape == (1, *x.shape)
