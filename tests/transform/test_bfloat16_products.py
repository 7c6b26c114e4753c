"""The low-rank product in bfloat16: no float32 copy of the data, gradients as exact as bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from tests.lora_cases import equations

TOKENS, IN, OUT, RANK = 96, 64, 48, 4


def case():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-2])  # noqa: E731
    return draw(TOKENS, IN) * np.sqrt(TOKENS), draw(IN, OUT), draw(IN, RANK), draw(RANK, OUT)


def adapter_of(kernel, a, b):
    variables = {"kernel": jnp.asarray(kernel, jnp.bfloat16)}
    config = jl.LoraConfig(rank=RANK, alpha=1.5 * RANK)
    adapter = jl.lora_init(jax.random.key(0), variables, config)
    leaves = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    pair = adapter.pairs["kernel"]
    pair = type(pair)(**{**vars(pair), **leaves})
    return variables, type(adapter)(**{**vars(adapter), "pairs": {"kernel": pair}})


def loss_of(variables, x):
    apply = jl.lora_apply(lambda variables, x: x @ variables["kernel"], platform="gpu")
    return lambda adapter: jnp.sum(jnp.sin(apply(jl.combine(variables, adapter), x).astype("f4")))


def test_no_float32_array_has_the_size_of_the_data():
    x, kernel, a, b = case()
    variables, adapter = adapter_of(kernel, a, b)
    loss = loss_of(variables, jnp.asarray(x, jnp.bfloat16))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr
    for eqn in equations(jaxpr):
        for var in eqn.outvars:
            assert var.aval.shape != (TOKENS, IN) or var.aval.dtype == jnp.bfloat16, eqn


def test_gradients_are_as_close_to_float64_as_bfloat16_allows():
    x, kernel, a, b = case()
    variables, adapter = adapter_of(kernel, a, b)
    gradient = jax.grad(loss_of(variables, jnp.asarray(x, jnp.bfloat16)))(adapter)
    pair = gradient.pairs["kernel"]
    rounded = lambda array: np.asarray(jnp.asarray(array, jnp.bfloat16)).astype(np.float64)  # noqa: E731
    x, kernel, a, b = (rounded(each) for each in (x, kernel, a, b))
    dy = np.cos(x @ kernel + 1.5 * (x @ a) @ b)  # (tokens, out), of the sum of sines
    for got, want in ((pair.a, 1.5 * x.T @ (dy @ b.T)), (pair.b, 1.5 * (x @ a).T @ dy)):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error < 2**-7  # one rounding of each factor, of their product, and of dy
