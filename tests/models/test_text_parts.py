"""The text part of folders with a vision tower: names, untouched tensors, adapters, fusing."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_lora as jl
from jax_lora.errors import ModelError
from jax_lora.models import Gemma3TextPart, Gemma3TextPartConfig, load, save

FIXTURES = Path(__file__).parent.parent / "fixtures"
WEIGHTS = "model.safetensors"
FOLDERS = ["gemma3/published", "gemma3/current", "mistral3/published", "mistral3/ministral"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_changed_text_model_keeps_the_vision_tower_and_the_names(name, tmp_path):
    stored = load_file(FIXTURES / name / WEIGHTS)
    model, params = load(FIXTURES / name)
    save(tmp_path, model, jax.tree.map(lambda leaf: (leaf * 2).astype(jnp.bfloat16), params))
    written = load_file(tmp_path / WEIGHTS)
    assert written.keys() == stored.keys()
    for tensor, before in stored.items():
        if "language_model" in tensor:
            expected = (before * 2).astype(jnp.bfloat16)
        else:
            expected = before
        np.testing.assert_array_equal(written[tensor], expected)
    config = json.loads((tmp_path / "config.json").read_text())
    before = json.loads((FIXTURES / name / "config.json").read_text())
    assert config["vision_config"] == before["vision_config"]
    assert config["dtype"] == "bfloat16"
    again, _ = load(tmp_path)
    assert again.config == model.config


def test_the_head_is_that_of_the_files(tmp_path):
    tied, untied = (load(FIXTURES / name)[0].config for name in (FOLDERS[0], FOLDERS[2]))
    assert (tied.tie_word_embeddings, untied.tie_word_embeddings) == (True, False)
    shutil.copytree(FIXTURES / FOLDERS[0], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / WEIGHTS)
    table = tensors["language_model.model.embed_tokens.weight"]
    save_file({**tensors, "language_model.lm_head.weight": table.copy()}, tmp_path / WEIGHTS)
    assert load(tmp_path)[0].config.tie_word_embeddings  # a copy of the embedding
    save_file({**tensors, "language_model.lm_head.weight": table + 1}, tmp_path / WEIGHTS)
    model, params = load(tmp_path)
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"]["kernel"], table.T + 1)


def test_an_adapter_names_the_modules_of_the_whole_model_in_full(tmp_path):
    model, params = load(FIXTURES / "gemma3/published")
    config = jl.LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "v_proj"])
    kernels = jl.find_kernels(model.apply, {"params": params}, jnp.zeros((1, 2), jnp.int32))
    adapter = jl.lora_init(jax.random.key(0), {"params": params}, config, kernels=kernels)
    jl.peft.save(tmp_path, adapter, names=model.hf_names, target="vllm")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.model.language_model.layers."
    assert all(name.startswith(stem) for name in tensors)
    # The vision tower has modules named q_proj too.
    listed = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(listed) == 4
    assert listed[0] == "model.language_model.layers.0.self_attn.q_proj"


def test_a_model_without_its_folder_cannot_be_saved(tmp_path):
    shutil.copytree(FIXTURES / "gemma3/published", tmp_path / "base")
    model, params = load(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="the folder that the model was loaded from"):
        save(tmp_path / "new", model, params)
    made = Gemma3TextPart(Gemma3TextPartConfig(**SIZES))
    params = jax.jit(made.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    with pytest.raises(ModelError, match="a model that was not loaded"):
        save(tmp_path / "new", made, params)
    assert not (tmp_path / "new" / WEIGHTS).exists()


SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
