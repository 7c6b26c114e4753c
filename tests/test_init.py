import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jax_lora as jl
from jax_lora.init import path_key
from tests.lora_cases import assert_bitwise, random_tree

TREE = {
    "attn": {"q_proj": {"kernel": (16, 8)}, "k_proj": {"kernel": (16, 8)}},
    "mlp": {"kernel": (16, 8), "bias": (8,)},
    "mlp2": {"kernel": (8, 16)},
    "norm": {"scale": (16,)},
}


@pytest.fixture
def tree():
    return random_tree(TREE)


def init(tree, seed=0, kernels=None, **config):
    config.setdefault("rank", 2)
    return jl.lora_init(jax.random.key(seed), tree, jl.LoraConfig(**config), kernels=kernels)


def test_a_is_gaussian_of_deviation_one_over_the_root_of_in_and_b_is_zero():
    adapter = init({"kernel": jnp.zeros((1024, 8))}, rank=64)
    a, b = adapter.pairs["kernel"].a, adapter.pairs["kernel"].b
    assert abs(float(a.std()) * 32 - 1) < 0.02 and abs(float(a.mean())) < 1e-3
    assert not b.any() and a.shape == (1024, 64) and b.shape == (64, 8)


def test_a_pair_depends_on_its_path_alone(tree):
    few, all_of_them = init(tree, targets="q_proj"), init(tree)
    assert_bitwise(few.pairs["attn/q_proj/kernel"], all_of_them.pairs["attn/q_proj/kernel"])
    shuffled = dict(reversed([*tree.items()]))
    assert_bitwise(init(shuffled), all_of_them)


def test_leaves_of_one_shape_get_factors_of_their_own(tree):
    pairs = init(tree).pairs
    a = [np.asarray(pairs[path].a).tobytes() for path in pairs if pairs[path].a.shape == (16, 2)]
    assert len(a) == len(set(a)) == 3


def test_the_same_key_gives_the_same_adapter_in_another_process(tree):
    code = (
        "import jax, jax.numpy as jnp, jax_lora as jl;"
        "t={'kernel': jnp.zeros((3, 2))};"
        "a = jl.lora_init(jax.random.key(0), t, jl.LoraConfig(rank=1));"
        "print(a.pairs['kernel'].a.tolist())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    here = init({"kernel": jnp.zeros((3, 2))}, rank=1).pairs["kernel"].a.tolist()
    assert printed == {f"{here}\n"}


def test_under_jit_eval_shape_and_a_mesh_it_is_the_same(tree):
    config, key = jl.LoraConfig(rank=2), jax.random.key(0)
    eager = jl.lora_init(key, tree, config)
    assert_bitwise(jax.jit(lambda key: jl.lora_init(key, tree, config))(key), eager)
    shapes = jax.eval_shape(lambda key: jl.lora_init(key, tree, config), key)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, eager)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("d"))), tree
    )
    assert_bitwise(jl.lora_init(key, spread, config), eager)


@pytest.mark.parametrize(
    ("generator", "dtype"),
    [("threefry2x32", "float32"), ("threefry2x32", "bfloat16"), ("rbg", "float32")],
)
def test_a_is_the_draw_that_its_path_and_key_alone_give(generator, dtype):
    def model(p, x, y):
        stacked = jnp.einsum("ltd,ldk->ltk", x, p["stacked"])
        return stacked, jnp.einsum("thk,hkd->td", y, p["heads"]), x[0] @ p["flat"], x[0] @ p["same"]

    tree = random_tree({"stacked": (5, 7, 3), "heads": (5, 7, 4), "flat": (7, 9), "same": (7, 2)})
    kernels = jl.find_kernels(model, tree, jnp.ones((5, 2, 7)), jnp.ones((2, 5, 7)))
    config, key = jl.LoraConfig(rank=3, targets="*", dtype=dtype), jax.random.key(4, impl=generator)
    make = lambda key: jl.lora_init(key, tree, config, kernels=kernels)  # noqa: E731
    inside = {"stacked": 7, "heads": 35, "flat": 7, "same": 7}
    shapes = {"stacked": (5, 7, 3), "heads": (5, 7, 3), "flat": (7, 3), "same": (7, 3)}
    for adapter in (make(key), jax.jit(make)(key)):
        for path, pair in adapter.pairs.items():
            normal = jax.random.normal(path_key(key, path), shapes[path], jnp.float32)
            assert_bitwise(pair.a, (normal * (1 / np.sqrt(inside[path]))).astype(dtype))


def test_the_key_of_a_path_never_changes():
    key = path_key(jax.random.key(0), "params/layers/attn/q_proj/kernel")
    assert jax.random.key_data(key).tolist() == [1560987900, 3269569455]


def test_many_keys_at_once_give_what_each_gives_alone(tree):
    make = lambda key: jl.lora_init(key, tree, jl.LoraConfig(rank=2))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(make)(keys)
    for i, key in enumerate(keys):
        assert_bitwise(jax.tree.map(lambda leaf, i=i: leaf[i], together), make(key))


def test_a_program_that_shards_the_factors_draws_the_same(tree):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    make = lambda key: jl.lora_init(key, tree, jl.LoraConfig(rank=2))  # noqa: E731
    key = jax.random.key(0)
    specs = {16: PartitionSpec("d"), 8: PartitionSpec("d"), 2: PartitionSpec(None, "d")}
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, specs[leaf.shape[0]]), jax.eval_shape(make, key)
    )
    spread = jax.jit(make, out_shardings=shardings)(key)
    assert len(spread.pairs["mlp/kernel"].a.sharding.device_set) == 8
    assert_bitwise(spread, make(key))


def layers(count):
    return {
        f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((13, 29), "float32")} for i in range(count)
    }


def test_more_layers_of_the_same_shapes_compile_nothing_more():
    compiled = []

    def note(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        init(layers(2))
        before = len(compiled)
        adapter = init(layers(40))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(adapter.pairs) == 40
    assert before > 0 and len(compiled) == before


def test_under_jit_more_layers_of_the_same_shapes_draw_in_the_same_loop():
    def draws(count):
        make = jax.jit(lambda key: jl.lora_init(key, layers(count), jl.LoraConfig(rank=2)))
        text = make.lower(jax.random.key(0)).compile().as_text()
        return text.count("log-plus-one(")

    assert draws(12) == draws(3) > 0


def test_shapes_are_enough(tree):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    assert_bitwise(init(shapes), init(tree))


def test_patterns_change_rank_and_scale(tree):
    adapter = init(tree, alpha=8.0, rank_pattern={"q_proj": 4}, alpha_pattern={"mlp": 2.0})
    shown = {path: (pair.rank, pair.scale) for path, pair in adapter.pairs.items()}
    assert shown == {
        "attn/k_proj/kernel": (2, 4.0),
        "attn/q_proj/kernel": (4, 2.0),
        "mlp/kernel": (2, 1.0),
        "mlp2/kernel": (2, 4.0),
    }


def test_modules_to_save_are_copies_of_their_own(tree):
    adapter = init(tree, targets="attn", modules_to_save=["norm", "bias"])
    assert list(adapter.whole) == ["mlp/bias", "norm/scale"]
    assert_bitwise(adapter.whole["norm/scale"], tree["norm"]["scale"])
    assert adapter.whole["norm/scale"] is not tree["norm"]["scale"]


def test_the_factors_type_is_the_configs(tree):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(init(half))} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(init(tree, dtype="bfloat16"))} == {
        "bfloat16"
    }


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"targets": "q_porj"}, jl.errors.NoMatchError, "(?s)targets='q_porj'.*attn/q_proj/kernel"),
        ({"targets": ["mlp", "nope"]}, jl.errors.NoMatchError, "targets='nope'"),
        ({"targets": "norm"}, jl.errors.NoMatchError, r"(?s)not kernels: norm/scale \(16,\)"),
        ({"rank_pattern": {"nope": 2}}, jl.errors.NoMatchError, "rank_pattern='nope'"),
        ({"alpha_pattern": {"nope": 2.0}}, jl.errors.NoMatchError, "alpha_pattern='nope'"),
        ({"exclude": ["nope"]}, jl.errors.NoMatchError, "exclude='nope'"),
        ({"exclude": ["*"]}, jl.errors.NoMatchError, "everything was excluded"),
        ({"modules_to_save": ["nope"]}, jl.errors.NoMatchError, "modules_to_save='nope'"),
        ({"rank": 10**9}, jl.errors.ConfigError, "(?s)rank of attn/k_proj/kernel.*at most 256"),
    ],
)
def test_what_cannot_be_meant_is_refused(tree, config, error, message):
    with pytest.raises(error, match=message):
        init(tree, **config)


def test_an_unused_pattern_may_be_a_warning(tree):
    with pytest.warns(UserWarning, match="targets='nope'"):
        adapter = init(tree, targets=["q_proj", "nope"], allow_unused=True)
    assert list(adapter.pairs) == ["attn/q_proj/kernel"]
    with pytest.raises(jl.errors.NoMatchError):
        init(tree, targets=["nope"], allow_unused=True)


@pytest.mark.parametrize("targets", ["all-linear", "layers"])
def test_an_ambiguous_kernel_names_find_kernels(targets):
    tree = {"layers": {"kernel": jnp.zeros((4, 8, 8))}}
    with pytest.raises(jl.errors.AmbiguousKernelError, match=r"(?s)\(4, 8, 8\).*find_kernels"):
        init(tree, targets=targets)


def test_a_tree_with_an_adapter_gets_no_second_one(tree):
    with pytest.raises(jl.errors.StructureError, match="(?s)already has an adapter.*partition"):
        init(jl.combine(tree, init(tree)))


def test_groups_of_targets(tree):
    assert list(init(tree, targets="attention").pairs) == [
        "attn/k_proj/kernel",
        "attn/q_proj/kernel",
    ]
    assert list(init(tree, targets="mlp").pairs) == ["mlp/kernel"]
    with pytest.raises(jl.errors.NoMatchError, match="no dense kernel has such a name"):
        init({"head": {"kernel": jnp.zeros((3, 4))}}, targets="attention")


@pytest.mark.parametrize("rows", [1, 3])  # of one row, a head's product is as small as its bias
def test_all_linear_leaves_the_output_head_out_by_its_use(tree, rows):
    def model(p, x):
        h = jnp.tanh(x @ p["attn"]["q_proj"]["kernel"])
        logits = h @ p["mlp2"]["kernel"] + p["norm"]["scale"][None]
        return 30.0 * jnp.tanh(logits / 30.0)

    kernels = jl.find_kernels(model, tree, jnp.ones((rows, 16)))
    assert kernels["mlp2/kernel"].is_output_head
    assert not kernels["attn/q_proj/kernel"].is_output_head
    assert list(init(tree, kernels=kernels).pairs) == ["attn/q_proj/kernel"]
    assert list(init(tree, kernels=kernels, targets="mlp2").pairs) == ["mlp2/kernel"]


def test_a_residual_stream_has_no_output_head(tree):
    def model(p, x):
        return x + jnp.tanh(x @ p["attn"]["q_proj"]["kernel"]) @ p["mlp2"]["kernel"]

    kernels = jl.find_kernels(model, tree, jnp.ones((3, 16)))
    assert not any(kernel.is_output_head for kernel in kernels.values())


def test_a_model_that_is_nothing_but_a_head_is_adapted():
    tree = {"kernel": jnp.ones((3, 4))}
    kernels = jl.find_kernels(lambda p, x: x @ p["kernel"], tree, jnp.ones((2, 3)))
    assert list(init(tree, kernels=kernels).pairs) == ["kernel"]
