"""load_model changes the base model to the model that an adapter was trained on."""

import json
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_lora as jl
from jax_lora.errors import AdapterFileError, ModelError

from .peft_cases import FIXTURES, FOLDERS, UNTIED, expected_of, logits_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "base_model.model.lm_head"
# What each adapter asks for: tokens, layers, an untied head.
CHANGED = {
    "replication": (32, 3),
    "resized": (35, 2),
    "resized_tied": (35, 2),
    "tied_embedding": (32, 2),
    "tied_resized_replication": (35, 3),
    "tied_whole_ends": (32, 2),
    "tied_whole_lookup": (32, 2),
}
FITTING = ("plain", "tied_both", "tied_whole", "tokens_tied", "conv1d")


def base_of(case):
    """The base as it was loaded."""
    facts = json.loads((FOLDERS / case / "base.json").read_text())
    return jl.models.load(FIXTURES / facts["model"])


@pytest.fixture
def folder(tmp_path):
    """A copy of an adapter on the output head that a test may spoil."""
    return shutil.copytree(FOLDERS / "head", tmp_path / "adapter")


def rewrite(folder, change=lambda tensors: None, **fields):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("case", CHANGED)
def test_the_model_is_changed_as_the_adapter_asks(case):
    model, params, adapter = jl.peft.load_model(FOLDERS / case, *base_of(case))
    tokens, layers = CHANGED[case]
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (tokens, layers)
    assert params["embed_tokens"]["embedding"].shape[0] == tokens
    assert params["layers"]["attn"]["q_proj"]["kernel"].shape[0] == layers
    untied = "tied" not in case or case in UNTIED
    is_untied = not model.config.tie_word_embeddings
    assert is_untied == ("lm_head" in params) and (is_untied == (case != "resized_tied" and untied))

    ids, expected = expected_of(case)
    combined = {"params": jl.combine(params, adapter)}
    np.testing.assert_allclose(logits_of(model, combined, ids), expected["logits"], atol=1e-4)
    merged = {"params": jl.merge(params, adapter)}
    np.testing.assert_allclose(logits_of(model, merged, ids), expected["logits"], atol=1e-4)


@pytest.mark.parametrize("case", CHANGED)
def test_the_adapter_is_saved_unchanged(case, tmp_path):
    model, params, adapter = jl.peft.load_model(FOLDERS / case, *base_of(case), dtype=None)
    jl.peft.save(tmp_path, adapter, names=model.hf_names, base=params)
    assert (tmp_path / WEIGHTS).read_bytes() == (FOLDERS / case / WEIGHTS).read_bytes()
    written, read = (json.loads((each / CONFIG).read_text()) for each in (tmp_path, FOLDERS / case))
    for config in (written, read):
        config["target_modules"] = sorted(config["target_modules"])
        config["modules_to_save"] = sorted(config["modules_to_save"] or [])
    assert written == read
    again = jl.peft.load(tmp_path, params, names=model.hf_names, dtype=None)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    once_more = jl.peft.load_model(tmp_path, *base_of(case), dtype=None)
    jax.tree.map(np.testing.assert_array_equal, once_more, (model, params, adapter))


@pytest.mark.parametrize("case", FITTING)
def test_a_model_that_the_adapter_fits_is_returned_unchanged(case):
    model, params = base_of(case)
    same_model, same_params, adapter = jl.peft.load_model(FOLDERS / case, model, params)
    assert same_model is model and same_params is params
    expected = jl.peft.load(FOLDERS / case, params, names=model.hf_names)
    jax.tree.map(np.testing.assert_array_equal, adapter, expected)


@pytest.mark.parametrize("case", ["plain", "tied_resized_replication"])
def test_variables_come_back_as_variables(case):
    model, params = base_of(case)
    bare = jl.peft.load_model(FOLDERS / case, model, params)
    variables = {"params": params}
    _, wrapped, adapter = jl.peft.load_model(FOLDERS / case, model, variables)
    assert (wrapped is variables) == (case == "plain")
    jax.tree.map(np.testing.assert_array_equal, wrapped, {"params": bare[1]})
    assert set(adapter) == {f"params/{path}" for path in bare[2]}


def test_the_order_of_layers_alone_changes_the_model(tmp_path):
    folder = shutil.copytree(FOLDERS / "plain", tmp_path / "adapter")
    model, params = base_of("plain")
    rewrite(folder, layer_replication=[[0, 2]])
    assert jl.peft.load_model(folder, model, params)[1] is params
    rewrite(folder, layer_replication=[[1, 2], [0, 1]])
    _, swapped, _ = jl.peft.load_model(folder, model, params)
    for new, old in zip(*map(jax.tree.leaves, (swapped["layers"], params["layers"])), strict=True):
        np.testing.assert_array_equal(new, old[::-1])


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_rows_of_added_tokens_are_those_of_the_file(base, folder):
    model, params = jl.models.load(FIXTURES / "llama" / base)
    table = params["embed_tokens"]["embedding"].T if base == "tied" else params["lm_head"]["kernel"]
    added = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)

    def grow(tensors):
        tensors[f"{HEAD}.base_layer.weight"] = np.concatenate([np.asarray(table.T), added])
        up = tensors[f"{HEAD}.lora_B.weight"]
        tensors[f"{HEAD}.lora_B.weight"] = np.concatenate([up, up[:3]])

    rewrite(folder, grow)
    larger, params, adapter = jl.peft.load_model(folder, model, params)
    assert larger.config.vocab_size == 35 and not larger.config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"]["kernel"][:, 32:], added.T)
    assert adapter.pairs["lm_head/kernel"].b.shape == (4, 35)


def test_an_adapter_that_does_not_fit_the_changed_model_is_refused(folder):
    def shrink(tensors):
        tensors[f"{HEAD}.base_layer.weight"] = tensors[f"{HEAD}.base_layer.weight"][:30]

    rewrite(folder, shrink)
    with pytest.raises(AdapterFileError, match=r"lm_head.lora_B.weight is \(32, 4\), expected"):
        jl.peft.load_model(folder, *base_of("head"))


def test_an_impossible_change_is_refused(tmp_path):
    folder = shutil.copytree(FOLDERS / "plain", tmp_path / "adapter")
    with pytest.raises(ModelError, match="a module of jax_lora.models"):
        jl.peft.load_model(folder, nn.Dense(3), {"kernel": jnp.ones((2, 3))})
    rewrite(folder, layer_replication=[[0, 3]])
    with pytest.raises(ModelError, match=r"the range \[0, 3\]"):
        jl.peft.load_model(folder, *base_of("plain"))
    with pytest.raises(ModelError, match="whose layers are two stacks"):
        jl.peft.load_model(folder, *jl.models.load(FIXTURES / "t5" / "relu"))


def test_adapters_of_other_models_need_no_models_of_this_package():
    code = "import sys, jax_lora.peft; print('jax_lora.models' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
