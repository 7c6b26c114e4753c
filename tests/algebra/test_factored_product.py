"""The low-rank product equals the dense product, for one value and for several."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lora.algebra import factored_product
from tests.algebra.test_low_rank import chains, low_rank
from tests.lora_cases import equations, random_tree


@settings(max_examples=30)
@given(chains(), st.data())
def test_a_contraction_with_any_axes_is_the_dense_one(chain, data):
    value, array = chain
    summed = data.draw(st.sets(st.integers(0, array.ndim - 1), min_size=1))
    names = [("unit", i) if x is None else x for i, x in enumerate(value.axes)]
    x = np.asarray(random_tree(tuple(array.shape[i] for i in sorted(summed)) + (5,), 9))
    x_axes = [*(names[i] for i in sorted(summed)), "tokens"]
    free = [i for i in range(array.ndim) if i not in summed]
    want = np.tensordot(array, np.float64(x), (sorted(summed), range(len(summed))))
    how = factored_product.projection(
        value, jnp.asarray(x), x_axes, [*(names[i] for i in free), "tokens"], want.shape,
        dtype=jnp.float32, precision="highest", x_first=False,
    )  # fmt: skip
    if how is None:  # x meets neither factor: only axes of size 1
        assert all(value.axes[i] is None for i in summed)
        return
    (got,) = factored_product.multiply([how], jnp.asarray(x), [value.factors])
    base = np.tensordot(np.float64(value.base), np.float64(x), (sorted(summed), range(len(summed))))
    np.testing.assert_allclose(base + got, want, rtol=1e-4, atol=1e-4)


def _plain(value, x):
    return factored_product.projection(
        value, x, ("x", 0), ("x", 1), (x.shape[0], value.shape[1]), dtype=x.dtype
    )  # fmt: skip


def test_values_with_the_same_data_share_one_down_projection():
    values = [low_rank("io", seed=seed, rank=seed + 1) for seed in range(3)]
    x = random_tree((5, 2), 4)
    how = [_plain(value, x) for value in values]
    factors = [value.factors for value in values]
    together = lambda x: factored_product.multiply(how, x, factors)  # noqa: E731
    alone = [factored_product.multiply([h], x, [f])[0] for h, f in zip(how, factors, strict=True)]
    for got, want in zip(together(x), alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    program = jax.make_jaxpr(together)(x).jaxpr
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    assert len(products) == 4  # one down to the ranks, three up


def test_the_scale_is_applied_where_there_are_the_fewest_numbers():
    value, x = low_rank("io"), jnp.ones((50, 2))
    jaxpr = jax.make_jaxpr(
        lambda x: factored_product.multiply([_plain(value, x)], x, [value.factors])
    )(x)
    shapes = [
        eqn.outvars[0].aval.shape for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "mul"
    ]
    assert shapes == [(50, 2)]  # tokens, rank
