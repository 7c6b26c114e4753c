"""Hugging Face folders: round trips, and a clear error for each kind of invalid folder."""

import dataclasses
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jax_lora.errors import ModelError, StructureError
from jax_lora.models import load, save
from jax_lora.models.ignored_fields import ignoring

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llama"


@pytest.fixture
def folder(tmp_path):
    """A single-file checkpoint that a test may spoil."""
    return Path(shutil.copytree(FIXTURES / "yarn", tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of five shards and an index."""
    return Path(shutil.copytree(FIXTURES / "untied", tmp_path / "model"))


def change_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("variant", ["untied", "tied", "biased", "llama3"])
def test_saving_a_loaded_model_keeps_every_tensor(variant, tmp_path):
    model, params = load(FIXTURES / variant)
    save(tmp_path, model, params)
    stored = {}
    for file in (FIXTURES / variant).glob("model*.safetensors"):
        stored.update(load_file(file))
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_save_and_load_round_trip_is_byte_identical(tmp_path):
    model, params = load(FIXTURES / "llama3", dtype=jnp.bfloat16)
    save(tmp_path / "one", model, params)
    again, loaded = load(tmp_path / "one")
    assert again == model
    save(tmp_path / "two", again, loaded)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("variant", ["tied", "biased", "dynamic", "yarn", "llama3"])
def test_saving_an_unchanged_model_writes_the_files_it_came_from(variant, tmp_path):
    save(tmp_path, *load(FIXTURES / variant))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (FIXTURES / variant / name).read_bytes(), name


def test_a_changed_configuration_is_written_anew_with_fields_it_does_not_govern(folder, tmp_path):
    change_json(folder / "config.json", transformers_version="1.2.3")
    model, params = load(folder)
    changed = model.clone(config=dataclasses.replace(model.config, rms_norm_eps=0.5))
    save(tmp_path / "out", changed, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["rms_norm_eps"], written["transformers_version"]) == (0.5, "1.2.3")
    assert load(tmp_path / "out")[0] == changed


def test_every_parameter_loads_straight_into_its_sharding(tmp_path):
    mesh = jax.make_mesh((2, 4), ("layer", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = {}

    def choose(path, shape):
        spec = P("layer", None, "tensor") if path.endswith("proj/kernel") else P()
        sharding[path] = NamedSharding(mesh, spec)
        return sharding[path]

    _, params = load(FIXTURES / "llama3", sharding=choose)
    _, plain = load(FIXTURES / "llama3")
    q_proj = params["layers"]["attn"]["q_proj"]["kernel"]
    assert q_proj.sharding == sharding["layers/attn/q_proj/kernel"]
    assert q_proj.addressable_shards[0].data.shape == (1, 16, 8)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    _, params = load(FIXTURES / "llama3", sharding=one)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {one}


def test_an_unknown_field_is_refused_by_name_unless_it_is_known_to_change_nothing(folder):
    change_json(folder / "config.json", surprise={"factor": 3}, another=None)
    message = refusal(folder)
    assert "surprise = {'factor': 3}, which is not known here" in message
    assert "load with ignore=('surprise',)" in message
    load(folder, ignore=["surprise"])
    with ignoring(["surprise"]):
        load(folder)


def test_a_field_that_changes_the_numbers_cannot_be_ignored(folder):
    change_json(folder / "config.json", quantization_config={"bits": 4})
    with pytest.raises(ModelError) as caught:
        load(folder, ignore=["quantization_config"])
    assert "it cannot be ignored" in str(caught.value)
    assert "the weights are stored quantized" in str(caught.value)


def test_another_head_is_refused_by_name(folder):
    change_json(folder / "config.json", architectures=["LlamaForTokenClassification"])
    assert "architectures ['LlamaForTokenClassification']" in refusal(folder)


def test_a_module_of_no_known_architecture_is_refused(tmp_path):
    with pytest.raises(ModelError, match="a Dense"):
        save(tmp_path, nn.Dense(2), {})


def test_mixed_dtypes_load_as_float32(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    _, params = load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_older_rope_fields_are_read(folder):
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), rope
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder)[0] == load(FIXTURES / "yarn")[0]


def test_saved_config_is_read_the_same_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for variant in ("untied", "tied", "biased", "dynamic", "yarn", "llama3"):
        save(tmp_path / variant, *load(FIXTURES / variant))
        ours = transformers.AutoConfig.from_pretrained(tmp_path / variant).to_dict()
        theirs = transformers.AutoConfig.from_pretrained(FIXTURES / variant).to_dict()
        rope = {**ours["rope_parameters"], **theirs["rope_parameters"]}
        assert ours["rope_parameters"] == rope
        for key in set(theirs) - {"rope_parameters", "transformers_version", "_name_or_path"}:
            assert ours[key] == theirs[key], (variant, key)


def test_all_wrong_tensors_are_listed_in_one_message(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 2), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 16), np.int8)
    tensors["model.surprise"] = np.zeros(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder)
    assert "missing: model.norm.weight (16,)" in message
    wrong = "wrong shape: model.layers.1.mlp.up_proj.weight is (3, 2), expected (24, 16)"
    assert wrong in message
    assert "wrong dtype: model.layers.0.self_attn.q_proj.weight is I8" in message
    assert "extra: model.surprise (4,)" in message


def test_redundant_tensors_are_let_pass(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "tied", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    load(folder)


def test_a_separate_head_in_a_tied_model_is_refused(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "tied", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * 2
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    message = refusal(folder)
    assert "not a copy: lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt3"}, "model_type 'gpt3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "xielu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_parameters": [1]}, "rope_parameters = [1]"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_an_unimplemented_setting_raises_an_error_that_names_it(folder, changes, message):
    change_json(folder / "config.json", **changes)
    text = refusal(folder)
    assert message in text
    assert str(folder / "config.json") in text


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "C:\\x", "x\0.safetensors", ".."],
)
def test_index_that_leaves_the_folder_is_refused_before_opening(sharded, name):
    change_json(sharded / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
    assert "the name of a file in the folder" in refusal(sharded)


def test_link_out_of_the_folder_is_refused(sharded, tmp_path):
    shard = sharded / "model-00003-of-00005.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    assert "a link to" in refusal(sharded)


def test_links_of_a_hugging_face_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "tied" / name, blobs / name[:5])
        (snapshot / name).symlink_to(f"../../blobs/{name[:5]}")
    load(snapshot)


def test_missing_shard_is_named(sharded):
    (sharded / "model-00003-of-00005.safetensors").unlink()
    assert "model-00003-of-00005.safetensors" in refusal(sharded)


def test_shard_without_its_tensor_is_named(sharded):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    weight_map["lm_head.weight"] = "model-00003-of-00005.safetensors"
    change_json(path, weight_map=weight_map)
    assert "a shard without lm_head.weight" in refusal(sharded)


def test_index_without_a_map_is_refused(sharded):
    change_json(sharded / "model.safetensors.index.json", weight_map={})
    assert "no weight_map" in refusal(sharded)


def test_pickle_files_are_refused_unopened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "pytorch_model.bin").chmod(0)
    message = refusal(folder)
    assert "only pickle files, pytorch_model.bin" in message
    assert "safetensors format" in message


def test_a_folder_without_weights_raises_a_clear_error(folder):
    (folder / "model.safetensors").unlink()
    assert "neither" in refusal(folder)


def test_an_absent_folder_raises_a_clear_error(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken JSON"),
        ('{"vocab_size": NaN}', "the value NaN"),
        ('{"a": 1, "a": 2}', "a duplicate key 'a'"),
        ("[" * 100_000, "broken JSON"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "broken JSON"),
        ("[]", "list"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "more than 1,048,576 bytes"),
    ],
)
def test_hostile_config_is_one_clear_error(folder, text, message):
    (folder / "config.json").write_text(text)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        (1 << 63).to_bytes(8, "little") + b"{}",
        (100 << 20).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}" + b"trailing",
    ],
)
def test_hostile_safetensors_header_is_one_clear_error(folder, header):
    (folder / "model.safetensors").write_bytes(header)
    assert "a broken file" in refusal(folder)


def test_saving_parameters_of_another_model_lists_the_differences(tmp_path):
    model, params = load(FIXTURES / "tied")
    wrong = {**params, "norm": {"scale": np.zeros(3)}, "extra": np.zeros(2)}
    wrong["embed_tokens"] = {"embedding": "words"}
    del wrong["layers"]
    with pytest.raises(StructureError) as caught:
        save(tmp_path / "out", model, wrong)
    message = str(caught.value)
    assert "missing: layers/attn/q_proj/kernel" in message
    assert "extra: extra (2,)" in message
    assert "wrong shape: norm/scale is (3,), expected (16,)" in message
    assert "not an array: embed_tokens/embedding is str" in message
    assert not (tmp_path / "out").exists()
