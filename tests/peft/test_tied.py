"""Adapters with a fully trained embedding, for models with a tied output head."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_lora as jl
from jax_lora.errors import AdapterFileError

from .peft_cases import FIXTURES, FOLDERS, expected_of, load_case, logits_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STEM = "base_model.model."
HEAD, TABLE = f"{STEM}lm_head.weight", f"{STEM}model.embed_tokens.weight"
PATH = "embed_tokens/embedding"


@pytest.fixture(scope="module")
def tied():
    return jl.models.load(FIXTURES / "llama" / "tied")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDERS / "tied_whole", tmp_path / "adapter")


def rewrite(folder, change, **fields):
    """Change the tensors, and fields of the configuration."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


def loaded_logits(model, params, folder):
    adapter = jl.peft.load(folder, params, names=model.hf_names)
    ids, expected = expected_of("tied_whole")
    return adapter, logits_of(model, {"params": jl.combine(params, adapter)}, ids), expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
        {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": False},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": None, "ensure_weight_tying": False},
    ],
    ids=["as PEFT wrote it", "not declared", "both named", "both named and declared", "not named"],
)
def test_a_head_that_equals_the_embedding_is_the_tied_weight(tied, folder, fields):
    rewrite(folder, lambda tensors: None, **fields)
    adapter, logits, expected = loaded_logits(*tied, folder)
    assert list(adapter.whole) == [PATH]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("saved", "fits"),
    [("embed_tokens", False), (["embed_tokens"], False), ("norms", True), (None, True)],
)
def test_an_embedding_without_a_head_is_of_both_ends_unless_it_was_trained(
    tied, folder, saved, fits
):
    model, params = tied
    change = lambda tensors: tensors.pop(HEAD)  # noqa: E731
    rewrite(folder, change, modules_to_save=saved)
    if fits:
        assert list(jl.peft.load(folder, params, names=model.hf_names).whole) == [PATH]
    else:
        with pytest.raises(
            AdapterFileError, match="embed_tokens.weight: changes only the embedding"
        ):
            jl.peft.load(folder, params, names=model.hf_names)


def test_the_copies_that_peft_writes_of_a_trained_embedding_are_ignored(tied, folder):
    def add_copies(tensors):
        for module in ("lm_head", "model.embed_tokens"):
            for copy in ("modules_to_save", "original_module"):
                tensors[f"{STEM}{module}.{copy}.weight"] = tensors[HEAD]

    rewrite(folder, add_copies)
    adapter, logits, expected = loaded_logits(*tied, folder)
    assert list(adapter.whole) == [PATH]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def test_a_head_without_an_embedding_is_compared_with_the_bases(tied, folder):
    model, params = tied
    table = np.asarray(params["embed_tokens"]["embedding"])

    def only_head(tensors):
        del tensors[TABLE]
        tensors[HEAD] = table

    rewrite(folder, only_head)
    for base in (params, jax.eval_shape(lambda: params)):
        assert not jl.peft.load(folder, base, names=model.hf_names).whole
    rewrite(folder, lambda tensors: tensors.update({HEAD: table + 1}))
    with pytest.raises(AdapterFileError, match="lm_head.weight: differs from model.embed"):
        jl.peft.load(folder, params, names=model.hf_names)


def test_the_base_weight_in_a_file_with_trained_rows_is_compared_and_ignored(tied, tmp_path):
    model, params = tied
    folder = shutil.copytree(FOLDERS / "tokens_tied", tmp_path / "adapter")
    rows, table = (f".token_adapter.{x}" for x in ("trainable_tokens_delta", "base_layer.weight"))

    def add_base(tensors):
        for module in ("lm_head", "model.embed_tokens"):
            tensors[STEM + module + table] = np.asarray(params["embed_tokens"]["embedding"])
        tensors[f"{STEM}lm_head{rows}"] = tensors[f"{STEM}model.embed_tokens{rows}"]

    rewrite(folder, add_base)
    adapter = jl.peft.load(folder, params, names=model.hf_names)
    assert list(adapter.rows) == [PATH] and not adapter.whole


def test_a_tied_table_trained_here_is_written_for_both_ends(tmp_path):
    model, variables, adapter = load_case("tied_whole")
    config = dataclasses.replace(adapter.config, metadata={})
    fresh = dataclasses.replace(adapter, config=config)
    jl.peft.save(tmp_path, fresh, names=model.hf_names)
    tensors, written = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    np.testing.assert_array_equal(tensors[HEAD], tensors[TABLE])
    assert written["ensure_weight_tying"] and written["modules_to_save"] == ["model.embed_tokens"]
    again = jl.peft.load(tmp_path, variables, names=model.hf_names)
    jax.tree.map(np.testing.assert_array_equal, again.whole, adapter.whole)
