"""What the fuzzer has found, each as a test of its own."""

import json
import shutil
from pathlib import Path

import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError, LoraError, ModelError
from tests.attacks.readers import READERS, seal

FIXTURES = Path(__file__).parents[1] / "fixtures"


def changed_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("fixture", "settings"),
    [
        ("llama/yarn", {"original_max_position_embeddings": -1}),
        ("llama/yarn", {"beta_fast": -1.0}),
        ("llama/yarn", {"beta_slow": 1e308}),
        ("llama/yarn", {"rope_theta": 1}),
        ("llama/yarn", {"factor": -4.0}),
    ],
    ids=str,
)
def test_rotary_settings_without_a_logarithm_are_a_model_error(tmp_path, fixture, settings):
    folder = shutil.copytree(FIXTURES / fixture, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    changed_json(folder / "config.json", **{name: raw[name] | settings})
    with pytest.raises(ModelError):
        jl.models.load(folder)


def test_a_file_of_an_index_with_a_very_long_name_is_a_model_error(tmp_path):
    READERS["index"].make(tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    changed_json(index, weight_map={"x": "s" * 300 + ".safetensors"})
    with pytest.raises(ModelError, match="without a path"):
        jl.models.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("reader", "file"), [("adapter", "adapter.json"), ("run", "step-000001/training.json")]
)
def test_a_checksum_of_a_file_with_a_very_long_name_is_a_checkpoint_error(tmp_path, reader, file):
    folder = tmp_path / "files"
    READERS[reader].make(folder)
    changed_json(folder / file, files={"d/" + "a" * 300: "0" * 32})
    (folder / file).write_bytes(seal((folder / file).read_bytes()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        READERS[reader].read(folder)


@pytest.mark.parametrize("base", [False, [], "x", {"x": 1}, {"x": {"shape": [1]}}], ids=str)
def test_a_fingerprint_of_the_wrong_type_is_a_checkpoint_error(tmp_path, base):
    folder = tmp_path / "files"
    READERS["adapter"].make(folder)
    changed_json(folder / "adapter.json", base=base)
    (folder / "adapter.json").write_bytes(seal((folder / "adapter.json").read_bytes()))
    with pytest.raises(CheckpointError):
        READERS["adapter"].read(folder)


def test_a_segment_that_does_not_fit_in_32_bits_is_a_model_error(tmp_path):
    folder = tmp_path / "files"
    READERS["encoder_tokenizer"].make(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"type_id": 1', f'"type_id": {2**31}'))
    with pytest.raises(LoraError):
        READERS["encoder_tokenizer"].read(folder)
