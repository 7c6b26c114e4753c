"""Models from outside jax_lora.models: any kernels, with names as a dict."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_lora as jl
from jax_lora.errors import AmbiguousKernelError
from tests.foreign.model_cases import drawn, random_adapter
from tests.lora_cases import merged_tree, random_tree


class Block(nn.Module):
    """Kernels of three axes and of two, not stacked."""

    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 4), name="query")(x)  # kernel (6, 2, 4)
        y = nn.DenseGeneral(6, axis=(-2, -1), name="out")(heads)  # kernel (2, 4, 6)
        return nn.Dense(5, name="up")(y)


NAMES = {
    "query/kernel": "encoder.attention.query",
    "out/kernel": "encoder.attention.out",
    "up/kernel": "encoder.up",
}


@pytest.fixture
def trained():
    model, x = Block(), jnp.ones((3, 6))
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    kernels = jl.find_kernels(model.apply, variables, x)
    return model, variables, kernels, random_adapter(variables, kernels), x


def test_kernels_of_several_axes_are_matrices_in_the_file(trained, tmp_path):
    model, variables, kernels, adapter, x = trained
    jl.peft.save(tmp_path, adapter, names=NAMES, base_model="mine")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.encoder.attention"
    assert tensors[f"{stem}.query.lora_B.weight"].shape == (8, 2)
    assert tensors[f"{stem}.out.lora_A.weight"].shape == (2, 8)
    again = jl.peft.load(tmp_path, variables, names=NAMES, kernels=kernels)
    jax.tree.map(np.testing.assert_array_equal, again.pairs, adapter.pairs)
    y = jax.jit(jl.lora_apply(model.apply))(jl.combine(variables, again), x)
    want = jax.jit(lambda *both: model.apply(merged_tree(*both), x))(variables, adapter)
    np.testing.assert_allclose(y, want, rtol=1e-4)


def test_axes_that_the_name_does_not_tell_are_asked_for(trained, tmp_path):
    _, variables, _, adapter, _ = trained
    jl.peft.save(tmp_path, adapter, names=NAMES)
    with pytest.raises(AmbiguousKernelError, match="kernels=jl.find_kernels"):
        jl.peft.load(tmp_path, variables, names=NAMES)


def test_a_stack_of_layers_and_experts_is_a_module_each(tmp_path):
    kernel = jnp.ones((2, 3, 4, 5))  # (layers, experts, in, out)
    tree = {"blocks": {"up": {"kernel": kernel}}}
    names = {"blocks/up/kernel": "model.layers.{layer}.mlp.experts.{expert}.up_proj"}
    pair = jl.LoraPair(
        a=random_tree((2, 3, 4, 2), 0),
        b=random_tree((2, 3, 2, 5), 1),
        in_axes=(2,),
        out_axes=(3,),
        stack_axes=(0, 1),
        scale=((1.0, 2.0, 1.0), (1.0, 1.0, 0.5)),
    )
    adapter = jl.Adapter({"blocks/up/kernel": pair}, {}, jl.LoraConfig(rank=2, alpha=2.0))
    jl.peft.save(tmp_path, adapter, names=names)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], np.asarray(pair.a)[1, 2].T)
    again = jl.peft.load(tmp_path, tree, names=names)
    jax.tree.map(np.testing.assert_array_equal, again.pairs, adapter.pairs)
    assert again.pairs["blocks/up/kernel"].scale == pair.scale
