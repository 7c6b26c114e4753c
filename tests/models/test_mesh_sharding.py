"""Shardings of parameters, adapters and activations on meshes of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_lora as jl
from jax_lora.errors import ConfigError, StructureError
from jax_lora.models.families import FAMILIES
from jax_lora.models.mesh_sharding import AXES, mesh_sharding, row_spec
from jax_lora.models.parameter_shapes import parameter_shapes

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "expert": 2}
EVERYWHERE = AbstractMesh(tuple(SIZES.values()), AXES)


def used(spec):
    return {name for name in spec if name is not None}


def shapes_of(family):
    return parameter_shapes(FAMILIES[family].module(FAMILIES[family].config()))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_matrix_of_every_architecture_is_sharded(family):
    place = mesh_sharding(EVERYWHERE)
    for path, shape in shapes_of(family).items():
        spec = place(path, shape).spec
        stack = ("layers" in path) + ("experts" in path)
        is_matrix = len(shape) - stack == 2 and "relative_attention_bias" not in path
        assert ("fsdp" in spec) == is_matrix, path
        assert ("expert" in spec) == ("experts" in path), path
        if "layers" in path:
            assert spec[0] is None, path  # a scan slices this axis
        named = [name for name in spec if name is not None]
        assert len(named) == len(set(named)), path
        assert "data" not in named
        for size, name in zip(shape, spec, strict=True):
            assert name is None or size % SIZES[name] == 0


@pytest.mark.parametrize(
    ("family", "path", "spec"),
    [
        ("llama", "embed_tokens/embedding", P("tensor", "fsdp")),
        ("llama", "lm_head/kernel", P("fsdp", "tensor")),
        ("llama", "layers/attn/k_proj/kernel", P(None, "fsdp", "tensor")),
        ("llama", "layers/attn/o_proj/kernel", P(None, "tensor", "fsdp")),
        ("llama", "layers/mlp/up_proj/kernel", P(None, "fsdp", "tensor")),
        ("llama", "layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),
        ("llama", "layers/input_norm/scale", P(None, None)),
        ("phi3", "layers/mlp/gate_up_proj/kernel", P(None, "fsdp", "tensor")),
        ("qwen2", "layers/attn/q_proj/bias", P(None, "tensor")),
        ("mixtral", "layers/mlp/gate/kernel", P(None, "fsdp", None)),
        ("mixtral", "layers/mlp/experts/gate_up_proj", P(None, "expert", "fsdp", "tensor")),
        ("mixtral", "layers/mlp/experts/down_proj", P(None, "expert", "tensor", "fsdp")),
        ("gpt2", "layers/attn/c_attn/kernel", P(None, "fsdp", "tensor")),
        ("gpt2", "layers/mlp/c_proj/kernel", P(None, "tensor", "fsdp")),
        ("bert", "layers/attention/output/kernel", P(None, "tensor", "fsdp")),
        ("bert", "layers/mlp/intermediate/kernel", P(None, "fsdp", "tensor")),
        ("bert", "embeddings/word_embeddings/embedding", P("tensor", "fsdp")),
        ("bert", "lm_head/bias", P("tensor")),
        ("t5", "shared/embedding", P("tensor", "fsdp")),
        ("t5", "decoder/layers/cross_attn/o/kernel", P(None, "tensor", "fsdp")),
        ("t5", "encoder/relative_attention_bias/embedding", P(None, None)),
    ],
)
def test_the_axes_of_a_parameter(family, path, spec):
    shape = dict(shapes_of(family), **{"lm_head/kernel": (8, 16)})[path]
    assert mesh_sharding(EVERYWHERE)(path, shape).spec == spec
    assert mesh_sharding(EVERYWHERE)(f"params/{path}", shape).spec == spec


def test_without_tensor_the_input_axis_is_sharded():
    place = mesh_sharding(AbstractMesh((8,), ("fsdp",)))
    for name in ("attn/q_proj", "attn/o_proj", "mlp/down_proj"):
        assert place(f"layers/{name}/kernel", (2, 16, 32)).spec == P(None, "fsdp", None)
    assert place("embed_tokens/embedding", (32, 16)).spec == P("fsdp", None)


def test_axes_that_the_mesh_does_not_divide_are_not_sharded():
    place = mesh_sharding(AbstractMesh((4, 2), ("fsdp", "tensor")))
    assert place("lm_head/kernel", (16, 31)).spec == P("fsdp", None)
    assert place("layers/attn/q_proj/kernel", (4, 6, 8)).spec == P(None, None, "tensor")
    assert place("layers/attn/q_proj/kernel", (4, 6, 9)).spec == P(None, None, None)
    only = mesh_sharding(AbstractMesh((4,), ("fsdp",)))
    assert only("layers/attn/q_proj/kernel", (4, 6, 8)).spec == P(None, None, "fsdp")


def test_axes_of_size_one_and_data_shard_no_parameter():
    place = mesh_sharding(AbstractMesh((8, 1), ("data", "tensor")))
    assert not used(place("layers/attn/q_proj/kernel", (2, 16, 32)).spec)


def test_a_mesh_with_other_axes_is_refused():
    with pytest.raises(ConfigError, match="some of data, fsdp, tensor, expert") as caught:
        mesh_sharding(AbstractMesh((2,), ("model",)))
    assert "('model',)" in str(caught.value)


def test_rows_are_shared_by_data_and_fsdp():
    mesh = AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    assert row_spec(mesh) == row_spec(mesh, 16) == P(("data", "fsdp"))
    assert row_spec(mesh, 2) == P("data")  # fsdp does not divide the rest
    assert row_spec(mesh, 3) == P()
    assert row_spec(AbstractMesh((2,), ("tensor",))) == P()


# -----------------------------------------------------------------------------------------------
# Adapters
# -----------------------------------------------------------------------------------------------


def mesh_of(**sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def test_factors_are_sharded_like_their_kernels():
    mesh = mesh_of(fsdp=4, tensor=2)
    shapes = {"q_proj": (2, 8, 4), "o_proj": (2, 4, 8)}
    variables = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()
    }
    variables = {"layers": variables | {"head": {"bias": jnp.zeros((8,))}}}
    shardings = {
        "layers": {
            "q_proj": {"kernel": NamedSharding(mesh, P(None, "fsdp", "tensor"))},
            "o_proj": {"kernel": NamedSharding(mesh, P(None, "tensor"))},
            "head": {"bias": NamedSharding(mesh, P("fsdp"))},
        }
    }
    kernel = lambda path, shape: jl.Kernel(path, shape, jnp.float32, "dense", (1,), (2,), (0,))  # noqa: E731
    kernels = {
        path: kernel(path, shapes[name]) for name in shapes for path in [f"layers/{name}/kernel"]
    }
    config = jl.LoraConfig(rank=2, modules_to_save=("head",))
    make = lambda key: jl.lora_init(key, variables, config, kernels=kernels)  # noqa: E731
    adapter = jax.eval_shape(make, jax.random.key(0))
    found = jl.adapter_shardings(shardings, adapter)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    q, o = found.pairs["layers/q_proj/kernel"], found.pairs["layers/o_proj/kernel"]
    assert (q.a.spec, q.b.spec) == (P(None, "fsdp", None), P(None, None, "tensor"))
    assert (o.a.spec, o.b.spec) == (P(None, "tensor", None), P(None, None, None))
    assert found.whole["layers/head/bias"].spec == P("fsdp")


def test_magnitudes_and_biases_follow_the_outputs_and_rows_the_width():
    mesh = mesh_of(fsdp=4, tensor=2)
    variables = {
        "up": {
            "kernel": jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("fsdp", "tensor")))
        },
        "table": {
            "embedding": jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P("tensor", "fsdp")))
        },
    }
    config = jl.LoraConfig(rank=2, use_dora=True, targets="up")
    adapter = jl.lora_init(jax.random.key(0), variables, config)
    rows = jl.TokenRows.of(variables["table"]["embedding"], [1, 3])
    adapter = jl.Adapter(adapter.pairs, {}, config, {"table/embedding": rows})
    placed = jax.device_put(adapter, jl.adapter_shardings(variables, adapter))
    assert placed.pairs["up/kernel"].magnitude.sharding.spec == P("tensor")
    assert placed.rows["table/embedding"].values.sharding.spec == P(None, "fsdp")


def test_a_quantized_base_replicates_its_adapter_on_its_mesh():
    mesh = mesh_of(fsdp=8)
    params = {"kernel": jnp.ones((64, 64))}
    adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
    packed = jax.device_put(jl.quantize(params, "nf4"), NamedSharding(mesh, P()))
    found = jl.adapter_shardings(packed, adapter).pairs["kernel"]
    assert found.a.mesh == mesh and not used(found.a.spec)


def test_a_leaf_without_a_sharding_is_refused():
    params = {"kernel": np.ones((4, 2), np.float32)}
    adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
    with pytest.raises(StructureError, match="kernel") as caught:
        jl.adapter_shardings(params, adapter)
    assert "without a sharding" in str(caught.value)
    with pytest.raises(StructureError, match="no such leaf; the closest paths are other"):
        jl.adapter_shardings({"other": jnp.ones((4, 2))}, adapter)


def test_one_device_is_kept():
    params = {"kernel": jax.device_put(jnp.ones((4, 2)), jax.devices()[3])}
    adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
    found = jax.device_put(adapter, jl.adapter_shardings(params, adapter))
    assert {each.sharding for each in jax.tree.leaves(found)} == {params["kernel"].sharding}
