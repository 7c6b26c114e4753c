"""A bias of B: added to the product of its kernel, and an error for any other use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_lora as jl
from jax_lora.errors import MaterializeError, MergeError, StructureError
from tests.lora_cases import assert_bitwise, assert_close, random_tree, randomized

X = jax.random.normal(jax.random.key(2), (3, 8))
CONFIG = jl.LoraConfig(rank=2)


def pair_for(shape, in_axes, out_axes, stack_axes=(), scale=0.5, ranks=None):
    size = lambda axes: tuple(shape[axis] for axis in axes)  # noqa: E731
    pair = jl.LoraPair(
        jnp.zeros((*size(stack_axes), *size(in_axes), 2)),
        jnp.zeros((*size(stack_axes), 2, *size(out_axes))),
        in_axes, out_axes, stack_axes, scale, ranks,
        bias=jnp.zeros((*size(stack_axes), *size(out_axes))),
    )  # fmt: skip
    return randomized(pair)


def both_ways(fn, with_bias, shape, *axes, **options):
    """The function with a bias in the pair, and the one that adds scale * bias by itself."""
    tree, pair = {"w": random_tree(shape)}, pair_for(shape, *axes, **options)
    plain = dataclasses.replace(pair, bias=None)
    run = lambda fn, pair, form: jl.lora_apply(fn, on_materialize="error", form=form)(  # noqa: E731
        jl.combine(tree, jl.Adapter({"w": pair}, {}, CONFIG)), X
    )
    want = lambda bias: run(  # noqa: E731
        lambda p, x: with_bias(fn(p, x), bias), plain, "factored"
    )
    have = lambda bias, form: run(fn, dataclasses.replace(pair, bias=bias), form)  # noqa: E731
    return pair, want, have


# name -> (function, what the bias does to its result, shape, in, out and stack axes)
USES = {
    "dense": (lambda p, x: x @ p["w"], lambda y, b: y + 0.5 * b[None], (8, 6), (0,), (1,)),
    "weight first": (
        lambda p, x: p["w"] @ x.T,
        lambda y, b: y + 0.5 * b[:, None], (6, 8), (1,), (0,),
    ),
    "heads": (
        lambda p, x: jnp.einsum("td,dhk->htk", x, p["w"]),
        lambda y, b: y + 0.5 * b[:, None], (8, 2, 3), (0,), (1, 2),
    ),
    "heads in": (
        lambda p, x: jnp.einsum("thk,hkd->td", x.reshape(3, 2, 4), p["w"]),
        lambda y, b: y + 0.5 * b[None], (2, 4, 5), (0, 1), (2,),
    ),
    "cut": (
        lambda p, x: jnp.concatenate([x @ each for each in jnp.split(p["w"], 3, axis=1)], 1),
        lambda y, b: y + 0.5 * b[None], (8, 6), (0,), (1,),
    ),
    "layers": (
        lambda p, x: lax.map(lambda w: x @ w, p["w"]),
        lambda y, b: y + 0.5 * b[:, None], (3, 8, 6), (1,), (2,), (0,),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ecd,edo->eco", jnp.stack([x, x * x]), p["w"]),
        lambda y, b: y + 0.5 * b[:, None], (2, 8, 5), (1,), (2,), (0,),
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(3, 2, 4), p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")),
        lambda y, b: y + 0.5 * b[None, None], (3, 4, 6), (0, 1), (2,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_scale_times_bias_is_added_to_the_product(name):
    fn, with_bias, shape, *axes = USES[name]
    pair, want, have = both_ways(fn, with_bias, shape, *axes)

    @jax.jit
    def everything(bias):
        results = []
        for each in (want, lambda b: have(b, "factored"), lambda b: have(b, "merged")):
            value, pull = jax.vjp(each, bias)
            results.append((value, *pull(jnp.cos(value))))
        return results

    (value, gradient), *ours = everything(pair.bias)
    for value_, gradient_ in ours:
        assert_close(value_, value, 1e-5)
        assert_close(gradient_, gradient, 1e-5)


NO_MEANING = {
    "transposed": lambda p, x: jnp.ones((3, 6)) @ p["w"].T,
    "a part of the inputs": lambda p, x: x[:, :4] @ p["w"][:4],
    "scaled": lambda p, x: x @ (2.0 * p["w"]),
    "negated": lambda p, x: x @ -p["w"],
    "added to": lambda p, x: x @ (p["w"] + jnp.ones((8, 6))),
    "looked up": lambda p, x: p["w"][jnp.array([1, 2])],
    "one row": lambda p, x: p["w"][3],
    "scanned by inputs": lambda p, x: lax.scan(lambda h, w: (h + w, None), jnp.zeros(6), p["w"])[0],
    "returned": lambda p, x: p["w"],
    "a function of it": lambda p, x: x @ jnp.tanh(p["w"]),
}


@pytest.mark.parametrize("policy", ["allow", "error"])
@pytest.mark.parametrize("name", NO_MEANING)
def test_where_a_bias_has_no_meaning_the_leaf_is_named(name, policy):
    tree = {"layer": {"kernel": random_tree((8, 6))}}
    pair = pair_for((8, 6), (0,), (1,))
    combined = jl.combine(tree, jl.Adapter({"layer/kernel": pair}, {}, CONFIG))
    fn = lambda p, x: NO_MEANING[name]({"w": p["layer"]["kernel"]}, x)  # noqa: E731
    with pytest.raises(
        MaterializeError, match="(?s)layer/kernel at .*a bias.*not part of the weig"
    ):
        jl.lora_apply(fn, on_materialize=policy)(combined, X)


def test_shards_of_the_inputs_would_each_add_it():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    tree, pair = {"w": random_tree((8, 6))}, pair_for((8, 6), (0,), (1,))
    combined = jl.combine(tree, jl.Adapter({"w": pair}, {}, CONFIG))

    def split(w_spec, x_spec, out_spec, summed):
        product = lambda w, x: lax.psum(x @ w, "d") if summed else x @ w  # noqa: E731
        mapped = jax.shard_map(product, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=out_spec)
        return lambda p, x: mapped(p["w"], x)

    by_outputs = jl.lora_apply(split(P(None, "d"), P(), P(None, "d"), False))(combined, X)
    plain = jl.lora_apply(lambda p, x: x @ p["w"])(combined, X)
    assert_close(by_outputs, plain, 1e-5)
    with pytest.raises(MaterializeError, match="shard_map"):
        jl.lora_apply(split(P("d", None), P(None, "d"), P(), True))(combined, X)


def test_layers_that_are_left_out_have_no_bias():
    pair = pair_for((3, 8, 6), (1,), (2,), (0,), scale=(0.5, 1.0, 2.0), ranks=(2, 0, 1))
    scaled = np.asarray(pair.scaled_bias())
    want = np.asarray(pair.bias) * np.array([0.5, 0.0, 2.0], np.float32)[:, None]
    np.testing.assert_array_equal(scaled, want)
    assert pair.size == (2 + 0 + 1) * (8 + 6) + 2 * 6


def merge_case():
    shapes = {"q": {"kernel": (3, 8, 2, 4), "bias": (3, 2, 4)}, "kernel": (8, 6), "bias": (6,)}
    pairs = {
        "q/kernel": pair_for((3, 8, 2, 4), (1,), (2, 3), (0,), scale=(0.5, 1.0, 2.0)),
        "kernel": pair_for((8, 6), (0,), (1,)),
    }
    return random_tree(shapes), jl.Adapter(pairs, {}, CONFIG)


def model(p, x):
    q = jnp.einsum("td,ldhk->lthk", x, p["q"]["kernel"]) + p["q"]["bias"][:, None]
    return q, x @ p["kernel"] + p["bias"][None]


def test_merge_adds_it_to_the_layers_own_bias_and_unmerge_takes_it_off():
    tree, adapter = merge_case()
    merged = jl.merge(tree, adapter)
    assert_close(jl.lora_apply(model)(jl.combine(tree, adapter), X), model(merged, X), 1e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert_close(jl.unmerge(merged, adapter), tree, 1e-5)
    whole = jl.Adapter(adapter.pairs, {"bias": tree["bias"] + 1.0}, CONFIG)
    assert_close(jl.merge(tree, whole)["bias"], merged["bias"] + 1.0, 1e-5)


def test_merge_names_the_kernels_that_have_no_bias_beside_them():
    tree, adapter = merge_case()
    del tree["bias"]
    tree["q"]["bias"] = tree["q"]["bias"][:, 0]
    with pytest.raises(MergeError) as caught:
        jl.merge(tree, adapter)
    text = str(caught.value)
    assert "kernel: the base model has no leaf bias" in text and "use_bias=True" in text
    assert "q/bias: shape (3, 4); the adapter's bias has (3, 2, 4)" in text


def test_merge_says_that_only_kernels_have_a_bias_to_merge_into():
    tree, adapter = merge_case()
    pairs = {"table": adapter.pairs["kernel"]}
    with pytest.raises(MergeError, match="table: .* only for leaves named 'kernel'"):
        jl.merge({"table": tree["kernel"], "bias": tree["bias"]}, jl.Adapter(pairs, {}, CONFIG))


def test_a_magnitude_and_a_bias_do_not_go_together():
    tree, adapter = merge_case()
    pair = dataclasses.replace(adapter.pairs["kernel"], magnitude=jnp.ones(6))
    with pytest.raises(StructureError, match="kernel: has both a magnitude and a bias"):
        jl.combine(tree, jl.Adapter({"kernel": pair}, {}, CONFIG))


def test_checkpoints_and_masks_carry_it(tmp_path):
    tree, adapter = merge_case()
    jl.save_adapter(tmp_path / "adapter", adapter, base=tree)
    assert_bitwise(jl.load_adapter(tmp_path / "adapter", base=tree), adapter)
    mask = jl.trainable_mask(jl.combine(tree, adapter))
    assert mask["kernel"].pair.bias is True and mask["bias"] is False
