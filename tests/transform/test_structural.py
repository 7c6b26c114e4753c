"""Operations that move, slice, cast or scale a weight do not materialize it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from tests.lora_cases import adapt, assert_equals_merged, random_tree, randomized

X = jax.random.normal(jax.random.key(2), (3, 8))

CASES = {
    "plain": lambda p, x: x @ p["w"],
    "weight first": lambda p, x: p["w"].T @ x.T,
    "transpose": lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
    "transpose twice": lambda p, x: x @ p["w"].T.T,
    "cast and back": lambda p, x: x @ p["w"].astype(jnp.float16).astype(jnp.float32),
    "times a constant": lambda p, x: x @ (p["w"] * 2.0),
    "constant times": lambda p, x: x @ (0.5 * p["w"]),
    "times a traced scalar": lambda p, x: x @ (p["w"] * x[0, 0]),
    "divided by a constant": lambda p, x: x @ (p["w"] / 3.0),
    "divided by a traced scalar": lambda p, x: x @ (p["w"] / (2.0 + x[0, 0] ** 2)),
    "scaled per output": lambda p, x: x @ (p["w"] * jnp.arange(1.0, 7.0)[None, :]),
    "scaled per input": lambda p, x: x @ (p["w"] * x[0][:, None]),
    "negated": lambda p, x: x @ -p["w"],
    "plus an array": lambda p, x: x @ (p["w"] + jnp.ones((8, 6))),
    "array minus": lambda p, x: x @ (jnp.ones((8, 6)) - p["w"]),
    "slice of outputs": lambda p, x: x @ p["w"][:, 1:4],
    "slice of inputs": lambda p, x: x[:, 2:6] @ p["w"][2:6],
    "strided slice": lambda p, x: x[:, ::2] @ p["w"][::2, ::3],
    "reversed": lambda p, x: x @ p["w"][::-1, ::-1],
    "split outputs": lambda p, x: sum(x @ part for part in jnp.split(p["w"], 3, axis=1)),
    "dynamic slice": lambda p, x: (
        x @ lax.dynamic_slice(p["w"], (0, jnp.int32(x[0, 0] > 0)), (8, 3))
    ),
    "reshape outputs": lambda p, x: jnp.einsum("ti,iab->tab", x, p["w"].reshape(8, 2, 3)),
    "reshape inputs": lambda p, x: jnp.einsum(
        "tab,abo->to", x.reshape(3, 2, 4), p["w"].reshape(2, 4, 6)
    ),
    "reshape and back": lambda p, x: x @ p["w"].reshape(4, 2, 3, 2).reshape(8, 6),
    "extra axis": lambda p, x: (x[None] @ p["w"][None])[0],
    "squeeze": lambda p, x: x @ jnp.squeeze(jnp.expand_dims(p["w"], (0, 2, 4)), (0, 2, 4)),
    "stop_gradient of a copy": lambda p, x: x @ p["w"] + lax.stop_gradient(x @ p["w"]),
    "optimization barrier": lambda p, x: x @ lax.optimization_barrier(p["w"]),
    "swapaxes in einsum": lambda p, x: jnp.einsum("oi,ti->to", jnp.swapaxes(p["w"], 0, 1), x),
}


@pytest.mark.parametrize("name", CASES)
def test_the_structure_survives(name):
    fn = CASES[name]
    if name.startswith("cast"):
        tree = {"w": random_tree((8, 6)).astype(jnp.float16).astype(jnp.float32)}
        # A float16 cast rounds W0 alone here and W0 + delta in the merged model: halves of an ulp.
        assert_equals_merged(fn, tree, X, rtol=2e-3, gradient_rtol=2e-3)
    else:
        assert_equals_merged(fn, {"w": random_tree((8, 6))}, X)


STACKED = {
    "static index": lambda p, x: x @ p["w"][0] + jnp.tanh(x @ p["w"][1]),
    "traced index": lambda p, x: x @ p["w"][jnp.int32(x[0, 0] > 0)],
    "dynamic_index_in_dim": lambda p, x: x @ lax.dynamic_index_in_dim(
        p["w"], jnp.int32(x[0, 0] > 0), keepdims=False),
    "unstacked by a loop": lambda p, x: sum(x @ p["w"][i] for i in range(2)),
    "array index": lambda p, x: jnp.einsum("ti,tio->to", x, p["w"][jnp.array([0, 1, 1])]),
    "batched product": lambda p, x: jnp.einsum("ti,eio->teo", x, p["w"]),
    "einsum with shared letters": lambda p, x: jnp.einsum("eti,eio->eto", jnp.stack([x, 2 * x]), p["w"]),
    "summed over the stack": lambda p, x: jnp.einsum("ti,eio,e->to", x, p["w"], x[0, :2]),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKED)
def test_a_stack_keeps_a_pair_for_each_of_its_kernels(name):
    tree = {"w": random_tree((2, 8, 6))}
    fn = STACKED[name]
    kernel = jl.Kernel("w", (2, 8, 6), jnp.dtype("float32"), "dense", (1,), (2,), (0,))
    adapter = jl.lora_init(
        jax.random.key(0), tree, jl.LoraConfig(rank=2, targets="w"), kernels={"w": kernel}
    )
    assert adapter.pairs["w"].a.shape == (2, 8, 2)
    assert_equals_merged(fn, tree, X, adapter=randomized(adapter))


@pytest.mark.parametrize(
    "name", [n for n in STACKED if n not in ("batched product", "summed over the stack")]
)
def test_find_kernels_sees_the_stack(name):
    kernel = jl.find_kernels(STACKED[name], {"w": random_tree((2, 8, 6))}, X)["w"]
    assert (kernel.stack_axes, kernel.in_axes, kernel.out_axes) == ((0,), (1,), (2,))


def test_a_slice_of_a_gating_tensor_moves_only_its_own_output():
    tree = {"w": random_tree((2, 8, 6))}

    def gated(p, x):
        return x @ p["w"][0], x @ p["w"][1]

    adapter = adapt(gated, tree, X)
    nudged = jax.tree.map(lambda leaf: leaf, adapter)
    nudged.pairs["w"] = nudged.pairs["w"].__class__(
        adapter.pairs["w"].a, adapter.pairs["w"].b.at[1].add(1.0), *adapter_axes(adapter)
    )
    run = jl.lora_apply(gated, on_materialize="error")
    before, after = run(jl.combine(tree, adapter), X), run(jl.combine(tree, nudged), X)
    assert np.array_equal(before[0], after[0])
    assert not np.allclose(before[1], after[1])


def adapter_axes(adapter):
    pair = adapter.pairs["w"]
    return pair.in_axes, pair.out_axes, pair.stack_axes, pair.scale


MATERIALISED = {
    "mixing reshape": lambda p, x: (
        x.reshape(1, 24) @ jnp.tile(p["w"].reshape(48)[:24, None], (1, 2))
    ),
    "elementwise function": lambda p, x: x @ jnp.tanh(p["w"]),
    "sum of weights": lambda p, x: p["w"].sum() * x,
    "mask": lambda p, x: x @ (p["w"] * (jnp.arange(48.0).reshape(8, 6) > 20).astype(jnp.float32)),
    "concatenation": lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], axis=1),
    "gram matrix": lambda p, x: p["w"].T @ p["w"],
    "sorted": lambda p, x: x @ jnp.sort(p["w"], axis=0),
    "norm": lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])),
    "returned": lambda p, x: p["w"],
}


@pytest.mark.parametrize("name", MATERIALISED)
def test_what_has_no_rule_is_right_all_the_same(name):
    tree = {"w": random_tree((8, 6))}
    adapter = adapt(CASES["plain"], tree, X)
    assert_equals_merged(MATERIALISED[name], tree, X, adapter=adapter, on_materialize="allow")
    with pytest.raises(jl.errors.MaterializeError, match="w at .*\n  got: "):
        jl.lora_apply(MATERIALISED[name], on_materialize="error")(jl.combine(tree, adapter), X)
