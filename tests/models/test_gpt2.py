"""Features of GPT-2 only: files without a head, learned positions, scores divided by layer."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_lora.errors import ConfigError
from jax_lora.models import GPT2Config, load, replicate_layers, save, untie

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module")
def headless():
    return load(FIXTURES / "headless" / "gpt2")


def test_files_without_a_head_and_a_prefix_load(headless, tmp_path):
    model, params = headless
    stored = load_file(FIXTURES / "headless" / "gpt2" / "expected.safetensors")
    ids, mask = (jnp.asarray(stored[k].astype(np.int32)) for k in ("input_ids", "attention_mask"))
    logits = jax.jit(model.apply)({"params": params}, ids, attention_mask=mask)
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(logits[real], stored["logits"][real], atol=1e-4)
    save(tmp_path, model, params)  # with the names of a model with its head, and saying so
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["GPT2LMHeadModel"]
    assert "transformer.h.1.attn.c_attn.weight" in load_file(tmp_path / "model.safetensors")


def test_the_attention_masks_in_older_files_are_ignored(headless, tmp_path):
    model, params = headless
    save(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    again = load(tmp_path)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_kernels_stand_in_the_files_as_they_are_here(headless):
    kernel = load_file(FIXTURES / "headless" / "gpt2" / "model.safetensors")[
        "h.1.attn.c_attn.weight"
    ]
    ours = headless[1]["layers"]["attn"]["c_attn"]["kernel"][1]
    assert ours.shape == (16, 48)
    np.testing.assert_array_equal(ours, kernel)
    assert headless[0].hf_names["layers/attn/c_attn/kernel"] == "transformer.h.{layer}.attn.c_attn"
    assert headless[0].hf_names["wpe/embedding"] == "transformer.wpe"


def test_rows_longer_than_the_positions_are_refused(headless):
    model, params = headless
    with pytest.raises(ConfigError) as caught:
        model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32))
    assert "sequences of 17 tokens" in str(caught.value)
    assert "at most n_positions = 16" in str(caught.value)


def test_padding_has_no_positions_and_logits_beyond_the_table_are_nan(headless):
    model, params = headless
    ids, apply = jnp.ones((1, 20), jnp.int32), jax.jit(model.apply)
    for real, finite in ((16, True), (17, False)):
        mask = (jnp.arange(20, dtype=jnp.int32) >= 20 - real).astype(jnp.int32)[None]
        logits = apply({"params": params}, ids, attention_mask=mask)
        assert bool(jnp.isfinite(logits[0, -1]).all()) is finite


def test_packed_rows_may_be_longer_than_the_positions(headless):
    model, params = headless
    document = jnp.arange(9, dtype=jnp.int32)[None]  # (1, 9)
    row, numbers = jnp.tile(document, 2), jnp.repeat(jnp.arange(2, dtype=jnp.int32), 9)[None]
    apply = jax.jit(model.apply)
    packed = apply({"params": params}, row, positions=jnp.tile(document, 2), segment_ids=numbers)
    alone = apply({"params": params}, document)
    np.testing.assert_allclose(packed[:, 9:], alone, atol=1e-5)


def test_the_other_forms_of_the_model_fit_too(headless):
    untied, params = untie(*headless)
    assert params["lm_head"]["kernel"].shape == (16, 32)
    deeper, params = replicate_layers(untied, params, [[0, 2], [1, 2]])
    assert deeper.config.n_layer == 3
    logits = jax.eval_shape(deeper.apply, {"params": params}, jnp.zeros((1, 2), jnp.int32))
    assert logits.shape == (1, 2, 32)


@pytest.mark.parametrize("field", ["n_layer", "n_positions", "n_inner", "layer_norm_epsilon"])
def test_invalid_sizes_are_refused(field):
    with pytest.raises(ConfigError, match=f"GPT2Config: {field}"):
        GPT2Config(**{field: -1})


def test_hidden_states_unembed_to_the_logits(headless):
    model, params = headless

    @jax.jit
    def both(params, ids):
        hidden = model.apply({"params": params}, ids, return_hidden=True)
        logits = model.apply({"params": params}, hidden, method="unembed")
        return logits, model.apply({"params": params}, ids)

    np.testing.assert_allclose(*both(params, jnp.array([[3, 1, 4]])), atol=1e-6)
