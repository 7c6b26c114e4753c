"""Kernels that are quantized while a folder is read, or stored quantized in it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jax_lora as jl
from jax_lora.errors import ConfigError, ModelError, StructureError
from jax_lora.models import load, save
from tests.lora_cases import assert_bitwise

FIXTURES = Path(__file__).parents[1] / "fixtures"
STORED = FIXTURES / "nf4" / "llama"
DOWN = "model.layers.1.mlp.down_proj.weight"
IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama/untied", "nf4"), ("gpt2/tied", "int8"), ("qwen3_moe/untied", "nf4")],
)
def test_a_folder_is_read_as_if_it_were_quantized_afterwards(name, method):
    model, params = load(FIXTURES / name)
    kernels = jl.find_kernels(model.apply, {"params": params}, IDS)
    expected = jl.quantize({"params": params}, method, kernels=kernels)["params"]
    _, got = load(FIXTURES / name, quantize=method)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert_bitwise(got, expected)


def test_the_head_and_the_embedding_stay_arrays():
    _, params = load(FIXTURES / "llama/untied", quantize="nf4")
    assert isinstance(params["lm_head"]["kernel"], jax.Array)
    assert isinstance(params["embed_tokens"]["embedding"], jax.Array)
    assert isinstance(params["layers"]["mlp"]["up_proj"]["kernel"], jl.QuantizedWeight)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_arrays_of_a_kernel_are_sharded_as_the_kernel(method):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    rows = {"q_proj": ("fsdp", "tensor"), "down_proj": ("tensor", "fsdp")}

    def place(path, shape):
        names = next((axes for name, axes in rows.items() if name in path), ())
        return NamedSharding(mesh, PartitionSpec(*[None] * bool(names), *names))

    folder = STORED if method == "nf4" else FIXTURES / "llama/untied"
    _, plain = load(folder, quantize=method)
    _, params = load(folder, quantize=method, sharding=place)
    assert_bitwise(params, plain)
    codes = params["layers"]["mlp"]["down_proj"]["kernel"].arrays["codes"]
    assert codes.sharding.shard_shape(codes.shape)[1:] == (codes.shape[1] // 2, codes.shape[2] // 2)


def test_an_unknown_method_is_refused_before_weights_are_read():
    with pytest.raises(ConfigError, match="one of float8, int8, nf4"):
        load(FIXTURES / "llama/untied", quantize="int3")


# -----------------------------------------------------------------------------------------------
# Folders that bitsandbytes wrote
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "nf4"])
def test_codes_of_bitsandbytes_are_kept(method):
    _, params = load(STORED, quantize=method)
    kernel = params["layers"]["mlp"]["down_proj"]["kernel"]
    files, expected = (
        load_file(STORED / "model.safetensors"),
        load_file(STORED / "expected.safetensors"),
    )
    assert kernel.method == "nf4"
    codes = np.asarray(kernel.arrays["codes"][1])
    assert codes.tobytes() == files[DOWN].tobytes()
    values = np.asarray(jax.jit(jl.dequantize)(kernel))[1].T  # (out, in)
    assert values.tobytes() == expected["down_proj"].tobytes()


def test_logits_equal_pytorchs_on_the_weights_of_bitsandbytes():
    model, params = load(STORED)
    expected = load_file(STORED / "expected.safetensors")
    ids = jnp.asarray(expected["ids"], jnp.int32)
    run = jax.jit(jl.lora_apply(model.apply, on_materialize="error"))
    logits = run({"params": params}, ids)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def test_a_saved_copy_holds_arrays_and_loads(tmp_path):
    model, params = load(STORED)
    with pytest.raises(StructureError, match="call jl.dequantize"):
        save(tmp_path / "copy", model, params)
    plain = jax.jit(jl.dequantize)(params)
    save(tmp_path / "copy", model, plain)
    assert "quantization_config" not in json.loads((tmp_path / "copy/config.json").read_text())
    assert_bitwise(load(tmp_path / "copy")[1], plain)


def test_weights_in_nf4_are_not_quantized_by_another_method():
    with pytest.raises(ModelError, match="the folder is stored in NF4"):
        load(STORED, quantize="int8")


def _with(tmp_path, change):
    folder = shutil.copytree(STORED, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _state(tensors, **changes):
    name = f"{DOWN}.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes()) | changes
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)


DAMAGE = {
    "no scales": (lambda t: t.pop(f"{DOWN}.absmax"), "absmax"),
    "single quantization": (lambda t: t.pop(f"{DOWN}.nested_absmax"), "double quantization"),
    "few codes": (lambda t: t.update({DOWN: t[DOWN][:-1]}), "the shape"),
    "another shape": (lambda t: _state(t, shape=[64, 2**31 - 1]), "the shape"),
    "another type": (lambda t: _state(t, quant_type="fp4"), "quant_type"),
    "another block": (lambda t: _state(t, blocksize=128), "blocksize"),
    "no integer": (lambda t: _state(t, shape="64"), "shape"),
    "no number": (lambda t: _state(t, nested_offset=None), "nested_offset"),
    "another table": (lambda t: t.update({f"{DOWN}.quant_map": np.zeros(16, np.float32)}), "NF4"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_codes_are_refused(tmp_path, kind):
    change, message = DAMAGE[kind]
    with pytest.raises(ModelError, match=message):
        load(_with(tmp_path, change))


def test_other_formats_of_bitsandbytes_are_refused_by_name(tmp_path):
    folder = shutil.copytree(STORED, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="NF4 with double quantization"):
        load(folder)
