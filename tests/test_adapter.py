import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from tests.lora_cases import assert_bitwise, assert_close, random_tree, randomized


@pytest.fixture
def tree():
    return random_tree({"q": {"kernel": (6, 4), "bias": (4,)}, "v": {"kernel": (6, 4)}, "n": (6,)})


@pytest.fixture
def adapter(tree):
    config = jl.LoraConfig(rank=2, modules_to_save=["n"])
    return randomized(jl.lora_init(jax.random.key(0), tree, config))


def test_combine_and_partition_undo_each_other(tree, adapter):
    base, same = jl.partition(jl.combine(tree, adapter))
    assert jax.tree.structure(base) == jax.tree.structure(tree)
    assert jax.tree.structure(same) == jax.tree.structure(adapter)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (base, tree)), strict=True))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (same, adapter)), strict=True))
    combined = jl.combine(tree, adapter)
    again = jl.combine(*jl.partition(combined))
    assert jax.tree.structure(again) == jax.tree.structure(combined)


def test_a_combined_tree_survives_tree_functions(tree, adapter):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, jl.combine(tree, adapter))
    base, twice = jl.partition(doubled)
    assert_bitwise(base, jax.tree.map(lambda leaf: 2 * leaf, tree))
    assert_bitwise(twice, jax.tree.map(lambda leaf: 2 * leaf, adapter))


def test_all_that_does_not_fit_is_in_one_message(tree, adapter):
    wrong = {"q": {"kernel": jnp.ones((6, 5)), "bias": tree["q"]["bias"]}, "n": tree["n"]}
    with pytest.raises(jl.errors.StructureError) as caught:
        jl.combine(wrong, adapter)
    text = str(caught.value)
    assert "q/kernel: the tree has shape (6, 5), the adapter is for (6, 4)" in text
    assert "v/kernel: not in the tree; the closest paths are" in text
    assert "2 leaves of the adapter" in text


def test_combining_twice_is_refused(tree, adapter):
    with pytest.raises(jl.errors.StructureError, match="already has an adapter"):
        jl.combine(jl.combine(tree, adapter), adapter)


def test_partition_of_a_plain_tree_is_refused(tree):
    with pytest.raises(jl.errors.StructureError, match="without any LoraWeight"):
        jl.partition(tree)


def test_whole_leaves_stand_in_for_the_base(tree, adapter):
    apply = lambda p, x: x * p["n"][None]  # noqa: E731
    x = jnp.ones((2, 6))
    out = jl.lora_apply(apply)(jl.combine(tree, adapter), x)
    assert_close(out, x * adapter.whole["n"][None], 1e-6)
    gradient = jax.grad(lambda a: jl.lora_apply(apply)(jl.combine(tree, a), x).sum())(adapter)
    assert gradient.whole["n"].all()


def test_the_scale_by_hand():
    tree = {"kernel": jnp.zeros((2, 3))}
    adapter = jl.lora_init(jax.random.key(0), tree, jl.LoraConfig(rank=8, alpha=16.0))
    ones = jax.tree.map(jnp.ones_like, adapter)
    np.testing.assert_array_equal(ones.pairs["kernel"].delta(), np.full((2, 3), 16.0))


def test_layers_of_a_stack_may_differ_in_scale_and_rank():
    a = random_tree((3, 6, 2), 1).at[1, :, 1].set(0.0)
    b = random_tree((3, 2, 4), 2).at[1, 1].set(0.0)  # the second layer is of rank 1, padded
    pair = jl.LoraPair(a, b, (1,), (2,), (0,), scale=(1.0, 2.0, 0.0))
    adapter = jl.Adapter({"w": pair}, {}, jl.LoraConfig(rank=2))
    tree, x = {"w": random_tree((3, 6, 4))}, random_tree((5, 6), 3)
    apply = lambda p, x: jax.lax.map(lambda w: x @ w, p["w"])  # noqa: E731
    got = jl.lora_apply(apply, on_materialize="error")(jl.combine(tree, adapter), x)
    scales = np.array([1.0, 2.0, 0.0])[:, None, None]
    want = np.asarray(tree["w"], np.float64) + scales * np.einsum("lir,lro->lio", a, b)
    assert_close(got, np.einsum("ti,lio->lto", x, want).astype(np.float32), 1e-5)
    gradient = jax.grad(lambda t: jl.lora_apply(apply)(t, x).sum())(jl.combine(tree, adapter))
    pair = jl.partition(gradient)[1].pairs["w"]
    assert not pair.a[1, :, 1].any() and not pair.b[1, 1].any()  # padding never trains
    assert not pair.a[2].any() and not pair.b[2].any()


def test_sizes_follow_the_closed_formula():
    tree = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    init = lambda key: jl.lora_init(key, tree, jl.LoraConfig(rank=8))  # noqa: E731
    assert jax.eval_shape(init, jax.random.key(0)).size == 65_536 == 8 * (4096 + 4096)


@pytest.mark.parametrize(
    "use",
    [
        lambda leaf: jnp.ones((2, 4)) @ leaf,
        lambda leaf: jnp.dot(jnp.ones((2, 4)), leaf),
        lambda leaf: jnp.asarray(leaf),
        lambda leaf: nn.Dense(6, use_bias=False).apply(
            {"params": {"kernel": leaf}}, jnp.ones((2, 4))
        ),
    ],
    ids=["matmul", "dot", "asarray", "flax"],
)
def test_a_leaf_with_an_adapter_says_how_it_is_called_when_taken_for_an_array(use):
    params = {"w": {"kernel": jnp.ones((4, 6))}}
    combined = jl.combine(params, jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2)))
    with pytest.raises(jl.errors.StructureError) as caught:
        use(combined["w"]["kernel"])
    assert str(caught.value).startswith("w/kernel\n  got:      a LoraWeight in a computation")
    assert "jl.lora_apply(fn)(...)" in str(caught.value)
