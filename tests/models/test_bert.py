"""Features of BERT only: positions, and the names in its first files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_lora.errors import ModelError
from jax_lora.models import load, save

FIXTURE = Path(__file__).parent.parent / "fixtures" / "bert" / "masked_lm"


@pytest.fixture
def older(tmp_path):
    """A folder as the first BERTs were written: gamma and beta, buffers, copies of tied tensors."""
    tensors = load_file(FIXTURE / "model.safetensors")
    table, bias = tensors["bert.embeddings.word_embeddings.weight"], tensors["cls.predictions.bias"]
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in tensors.items()
    }
    tensors["cls.predictions.decoder.weight"], tensors["cls.predictions.decoder.bias"] = table, bias
    tensors["cls.seq_relationship.weight"] = tensors["bert.pooler.dense.weight"] = table
    tensors["bert.embeddings.position_ids"] = np.arange(16)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((FIXTURE / "config.json").read_bytes())
    return tmp_path


def test_older_names_and_leftovers_load(older):
    params, again = load(FIXTURE)[1], load(older)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_other_leftovers_are_refused(older):
    tensors = load_file(older / "model.safetensors")
    save_file(tensors | {"qa_outputs.bias": np.zeros(2)}, older / "model.safetensors")
    with pytest.raises(ModelError, match=r"extra: qa_outputs.bias \(2,\)"):
        load(older)


def test_padding_counts_as_positions():
    model, params = load(FIXTURE)
    positions = model.apply({"params": params}, jnp.zeros((2, 3), jnp.int32), method="positions")
    np.testing.assert_array_equal(positions, [[0, 1, 2], [0, 1, 2]])


def test_kernels_have_hugging_faces_names():
    names = load(FIXTURE)[0].hf_names
    assert (
        names["layers/attention/output/kernel"]
        == "bert.encoder.layer.{layer}.attention.output.dense"
    )
    assert names["layers/mlp/output/kernel"] == "bert.encoder.layer.{layer}.output.dense"
    assert names["lm_head/dense/kernel"] == "cls.predictions.transform.dense"
    assert load(FIXTURE.parent / "classifier")[0].hf_names["pooler/kernel"] == "bert.pooler.dense"


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_model_without_a_head_keeps_its_names_and_its_pooler(tmp_path, prefix):
    tensors = load_file(FIXTURE / "model.safetensors")
    tensors = {
        prefix + name.removeprefix("bert."): each
        for name, each in tensors.items()
        if name.startswith("bert.")
    }
    width = tensors[f"{prefix}embeddings.LayerNorm.bias"].shape[0]
    tensors[f"{prefix}pooler.dense.weight"] = np.eye(width, dtype=np.float32)
    tensors[f"{prefix}pooler.dense.bias"] = np.ones(width, np.float32)
    config = json.loads((FIXTURE / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    model, params = load(tmp_path, dtype="float32")
    query = model.hf_names["layers/attention/query/kernel"]
    assert query == f"{prefix}encoder.layer.{{layer}}.attention.self.query"
    save(tmp_path / "again", model, params)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all((again[name] == tensors[name]).all() for name in tensors)
