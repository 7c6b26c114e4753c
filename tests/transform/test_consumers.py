"""Contractions, lookups, ragged products and convolutions apply the factors separately from W0."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jax_lora as jl
from tests.lora_cases import adapt, assert_equals_merged, random_tree, randomized

D = 8
X = jax.random.normal(jax.random.key(2), (3, D))

# name -> (shape of the kernel, function, in_axes, out_axes, stack_axes)
DENSE = {
    "matmul": ((D, 6), lambda w, x: x @ w, (0,), (1,), ()),
    "three-dimensional data": ((D, 6), lambda w, x: x[None] @ w, (0,), (1,), ()),
    "vector": ((D, 6), lambda w, x: x[0] @ w, (0,), (1,), ()),
    "tensordot": ((D, 6), lambda w, x: jnp.tensordot(x, w, 1), (0,), (1,), ()),
    "weight first": ((6, D), lambda w, x: w @ x.T, (1,), (0,), ()),
    "heads out": ((D, 2, 3), lambda w, x: jnp.einsum("td,dhk->thk", x, w), (0,), (1, 2), ()),
    "heads first": ((D, 2, 3), lambda w, x: jnp.einsum("td,dhk->htk", x, w), (0,), (1, 2), ()),
    "heads in": (
        (2, 4, 5), lambda w, x: jnp.einsum("thk,hkd->td", x.reshape(3, 2, 4), w), (0, 1), (2,), ()
    ),
    "fused qkv": ((D, 3, 2, 2), lambda w, x: jnp.einsum("td,dahk->athk", x, w), (0,), (1, 2, 3), ()),
    "fused qkv, cut": (
        (D, 12), lambda w, x: sum(jnp.tanh(p) for p in jnp.split(x @ w, 3, -1)), (0,), (1,), ()
    ),
    "experts": (
        (2, D, 5), lambda w, x: jnp.einsum("ecd,edo->eco", jnp.stack([x, x * x]), w), (1,), (2,), (0,)
    ),
    "experts by vmap": (
        (2, D, 5), lambda w, x: jax.vmap(lambda w, x: x @ w)(w, jnp.stack([x, x * x])), (1,), (2,), (0,)
    ),
    "experts, last axis": (
        (D, 5, 2), lambda w, x: jax.vmap(lambda w: x @ w, in_axes=-1)(w), (0,), (1, 2), ()
    ),
    "integer operand positions": (
        (D, 6), lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))), (0,), (1,), ()
    ),
    "inner gradient": (
        (D, 6), lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x), (0,), (1,), ()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    shape, fn, in_axes, out_axes, stack_axes = DENSE[name]
    tree = {"w": random_tree(shape)}
    apply = lambda p, x: fn(p["w"], x) ** 2  # noqa: E731 - squared, so that it is no output head
    kernel = jl.find_kernels(apply, tree, X)["w"]
    assert kernel.kind == "dense"
    assert (kernel.in_axes, kernel.out_axes, kernel.stack_axes) == (in_axes, out_axes, stack_axes)
    adapter = adapt(apply, tree, X)
    assert adapter.size == kernel.pair_size(2)
    assert_equals_merged(apply, tree, X, adapter=adapter)


def test_an_expert_that_the_loss_does_not_touch_gets_no_gradient():
    tree = {"w": random_tree((3, D, 5))}
    tokens = jnp.stack([X, X, X])

    def loss(p):
        return (jnp.einsum("ecd,edo->eco", tokens, p["w"])[1] ** 2).sum()

    adapter = adapt(loss, tree)
    run = jl.lora_apply(loss, on_materialize="error")
    gradient = jax.grad(lambda each: run(jl.combine(tree, each)))(adapter).pairs["w"]
    for factor in (gradient.a, gradient.b):
        assert not factor[0].any() and not factor[2].any() and factor[1].any()


LOOKUPS = {
    "take": lambda p, ids: jnp.take(p["w"], ids, axis=0),
    "index": lambda p, ids: p["w"][ids],
    "one id": lambda p, ids: p["w"][ids[0, 0]],
    "clipped": lambda p, ids: jnp.take(p["w"], ids + 3, axis=0, mode="clip"),
    "filled": lambda p, ids: jnp.nan_to_num(jnp.take(p["w"], ids + 3, axis=0, mode="fill")),
    "columns": lambda p, ids: jnp.take(p["w"], ids % 4, axis=1),
    "one-hot": lambda p, ids: jax.nn.one_hot(ids, 7) @ p["w"],
    "tied head": lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T,
}
IDS = jnp.array([[0, 3, 6], [1, 1, 5]])


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookup(name):
    tree = {"w": random_tree((7, 4))}
    # One id alone is a slice that no contraction follows: nothing says that it is a table.
    adapter = adapt(LOOKUPS["index" if name == "one id" else name], tree, IDS)
    assert_equals_merged(LOOKUPS[name], tree, IDS, adapter=adapter)


def test_a_tied_table_is_one_embedding_that_both_ends_see():
    tree = {"w": random_tree((7, 4))}
    kernel = jl.find_kernels(LOOKUPS["tied head"], tree, IDS)["w"]
    assert (kernel.kind, kernel.in_axes, kernel.out_axes, kernel.uses) == (
        "embedding",
        (0,),
        (1,),
        2,
    )


def test_ragged_dot():
    tree = {"w": random_tree((3, D, 5))}
    tokens = jax.random.normal(jax.random.key(4), (10, D))
    sizes = jnp.array([2, 5, 3], jnp.int32)
    apply = lambda p, x: jnp.tanh(lax.ragged_dot(x, p["w"], sizes))  # noqa: E731
    kernel = jl.find_kernels(apply, tree, tokens)["w"]
    assert (kernel.in_axes, kernel.out_axes, kernel.stack_axes) == ((1,), (2,), (0,))
    assert_equals_merged(apply, tree, tokens)


def _convolution(layout, **options):
    return lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1,) * (x.ndim - 2), "SAME", dimension_numbers=layout, **options
    )


CONVOLUTIONS = {
    "2-D": ((3, 3, 4, 6), (2, 5, 5, 4), _convolution(("NHWC", "HWIO", "NHWC"))),
    "channels first": ((6, 4, 3, 3), (2, 4, 5, 5), _convolution(("NCHW", "OIHW", "NCHW"))),
    "1-D": ((3, 4, 6), (2, 5, 4), _convolution(("NHC", "HIO", "NHC"))),
    "grouped": ((3, 3, 2, 6), (2, 5, 5, 4), _convolution(("NHWC", "HWIO", "NHWC"), feature_group_count=2)),
    "depthwise": ((3, 3, 1, 4), (2, 5, 5, 4), _convolution(("NHWC", "HWIO", "NHWC"), feature_group_count=4)),
    "dilated": ((3, 3, 4, 6), (2, 5, 5, 4), _convolution(("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    kernel_shape, data_shape, fn = CONVOLUTIONS[name]
    tree = {"w": random_tree(kernel_shape)}
    data = jax.random.normal(jax.random.key(3), data_shape)
    assert jl.find_kernels(fn, tree, data)["w"].kind == "conv"
    assert_equals_merged(fn, tree, data)


def test_a_convolution_by_batch_groups_materialises_and_is_right():
    tree = {"w": random_tree((3, 3, 4, 6))}
    data = jax.random.normal(jax.random.key(3), (2, 5, 5, 4))
    fn = _convolution(("NHWC", "HWIO", "NHWC"), batch_group_count=2)
    assert_equals_merged(fn, tree, data, on_materialize="allow")


@pytest.mark.parametrize("precision", [None, "highest", ("default", "highest")])
def test_precision_reaches_the_thin_products(precision):
    tree = {"w": random_tree((D, 6))}
    fn = lambda p, x: lax.dot(x, p["w"], precision=precision)  # noqa: E731
    assert_equals_merged(fn, tree, X)


def test_integer_data_materialises_no_integer_factors():
    tree = {"w": random_tree((D, 6))}
    fn = lambda p, x: x.astype(jnp.int32) @ p["w"].astype(jnp.int32)  # noqa: E731
    adapter = randomized(adapt(lambda p, x: x @ p["w"], tree, X), size=3.0)
    with_lora = jl.lora_apply(fn, on_materialize="allow")
    assert with_lora(jl.combine(tree, adapter), X).dtype == jnp.int32


def test_second_order_derivatives_of_each_consumer_agree_with_finite_differences():
    jax.config.update("jax_enable_x64", True)
    try:
        _check_second_order()
    finally:
        jax.config.update("jax_enable_x64", False)


def _check_second_order():
    from jax.test_util import check_grads

    for shape, fn in {
        "dense": ((3, 2), lambda p, x: jnp.tanh(x @ p["w"])),
        "stacked": ((2, 3, 2), lambda p, x: jnp.tanh(jnp.einsum("ti,eio->teo", x, p["w"]))),
        "attend": ((2, 3), lambda p, x: jnp.tanh(x @ p["w"].T)),
    }.values():
        tree = {"w": random_tree(shape).astype(jnp.float64)}
        x = jax.random.normal(jax.random.key(1), (2, 3), jnp.float64)
        adapter = randomized(adapt(fn, tree, x, dtype="float64"), size=0.1)
        run = jl.lora_apply(fn, on_materialize="error")
        check_grads(
            lambda each, run=run, tree=tree, x=x: run(jl.combine(tree, each), x),
            (adapter,), order=2, modes=("fwd", "rev"), rtol=1e-6,
        )  # fmt: skip
