"""Quantized base weights on a mesh: the same losses and gradients, and codes are gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jax_lora as jl
from jax_lora.finetune.devices import make_mesh, split_rows
from jax_lora.finetune.losses import causal_lm_loss
from jax_lora.models import Llama, LlamaConfig, load, save
from jax_lora.models.mesh_sharding import gather_codes, mesh_sharding
from tests.finetune.test_meshes import batch_of
from tests.lora_cases import assert_close, randomized
from tests.tiny_model import random_params

MODEL = Llama(
    LlamaConfig(
        vocab_size=192,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
)


@pytest.fixture(autouse=True)
def promotion():
    # In float64, where the order of a sum does not show; the weights are made in float32.
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(
        path,
        MODEL,
        jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(0.25), random_params(MODEL)),
    )
    return path


def measured(folder, method, mesh=None):
    """The compiled loss and gradient, and its result."""
    place = None if mesh is None else mesh_sharding(mesh)
    model, params = load(folder, jnp.float64, quantize=method, sharding=place)
    if mesh is not None:
        params = gather_codes(params, mesh)
    variables = {"params": params}
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    kernels = jl.find_kernels(model.apply, variables, ids)
    init = functools.partial(jl.lora_init, config=jl.LoraConfig(rank=2), kernels=kernels)
    adapter = randomized(jax.eval_shape(init, jax.random.key(0), variables))
    adapter = jax.tree.map(np.float64, adapter)
    batch = batch_of(causal_lm_loss)
    if mesh is not None:
        adapter = jax.device_put(adapter, jl.adapter_shardings(variables, adapter))
        batch = split_rows(batch, mesh)
    loss = jl.lora_apply(functools.partial(causal_lm_loss, model.clone(mesh=mesh)))

    @jax.jit
    def step(adapter, variables, batch):
        return jax.value_and_grad(lambda adapter: loss(jl.combine(variables, adapter), batch)[0])(
            adapter
        )

    compiled = step.lower(adapter, variables, batch).compile()
    return compiled, compiled(adapter, variables, batch)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_losses_and_gradients_are_those_on_one_device(folder, method):
    mesh = make_mesh("fsdp=4,tensor=2", 8, jax.devices())
    _, alone = measured(folder, method)
    compiled, together = measured(folder, method, mesh)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)
    assert_close(jax.device_get(together[1]), jax.device_get(alone[1]), 1e-5)
    # A kernel of 256 x 256 is gathered over fsdp as codes; its part of `tensor` stays.
    gathers = re.findall(r"= (\w+)\[([\d,]*)\][^=]* all-gather\(", compiled.as_text())
    sizes = {(kind, int(np.prod([int(n) for n in size.split(",")]))) for kind, size in gathers}
    codes = "u8" if method == "nf4" else "s8"
    assert any(kind == codes for kind, _ in sizes), sizes
    assert not {kind for kind, size in sizes if size >= 256 * 128} - {codes}, sizes


def test_factors_are_sharded_like_the_quantized_kernel(folder):
    mesh = make_mesh("fsdp=4,tensor=2", 8, jax.devices())
    place = mesh_sharding(mesh)
    for method in (None, "nf4", "int8"):
        model, params = load(folder, jnp.float64, quantize=method, sharding=place)
        shapes = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        kernels = jl.find_kernels(model.apply, {"params": params}, shapes)
        init = functools.partial(jl.lora_init, config=jl.LoraConfig(rank=2), kernels=kernels)
        adapter = jax.eval_shape(init, jax.random.key(0), {"params": params})
        found = jl.adapter_shardings({"params": params}, adapter)
        pair = found.pairs["params/layers/attn/q_proj/kernel"]
        assert isinstance(pair.a, NamedSharding)
        assert (pair.a.spec[1], pair.b.spec[2]) == ("fsdp", "tensor"), method
