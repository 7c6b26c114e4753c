"""adapter.json of earlier versions."""

import json

import pytest

from jax_lora.checkpoint.manifest import read_manifest
from jax_lora.errors import CheckpointError
from jax_lora.storage import json_files

TEXT = '{"base_model_name_or_path": "my-org/my-base", "r": 2}'
PAIR = {
    "a": {"shape": [16, 2], "dtype": "float32", "checksum": "00"},
    "b": {"shape": [2, 32], "dtype": "float32", "checksum": "11"},
    "in_axes": [0],
    "out_axes": [1],
    "stack_axes": [],
    "scale": 4.0,
}
CONFIG = {
    "rank": 2,
    "alpha": 8.0,
    "targets": ["up"],
    "exclude": [],
    "rank_pattern": [],
    "alpha_pattern": [],
    "modules_to_save": [],
    "use_rslora": False,
    "use_dora": False,
    "dropout": 0.0,
    "init": "gaussian",
    "dtype": "float32",
    "allow_unused": False,
}
OLD = {
    "format": "jax_lora adapter",
    "whole": {},
    "arrays": "arrays-0123456789ab",
    "files": {"d/0": "22"},
    "base": None,
}
FORMATS = {
    1: {**OLD, "version": 1, "config": CONFIG, "pairs": {"up/kernel": PAIR}},
    2: {
        **OLD,
        "version": 2,
        "config": {**CONFIG, "layers": None},
        "pairs": {"up/kernel": {**PAIR, "ranks": None}},
        "rows": {},
    },
}


def write(folder, values, **settings):
    values = {**values, "config": {**values["config"], **settings}}
    file = folder / "adapter.json"
    file.write_text(json.dumps(values | {"seal": json_files.json_checksum(values)}))
    return file


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize(
    ("settings", "metadata"),
    [({"peft_config": TEXT}, {"peft": TEXT}), ({"peft_config": ""}, {}), ({}, {})],
    ids=["with PEFT's text", "without", "from before there was a field for it"],
)
def test_the_text_of_a_peft_configuration_is_kept(version, settings, metadata, tmp_path):
    manifest = read_manifest(write(tmp_path, FORMATS[version], **settings))
    assert manifest.config.metadata == metadata
    assert manifest.config.rank == 2 and manifest.config.targets == ("up",)
    assert manifest.adapter.pairs["up/kernel"].scale == 4.0


@pytest.mark.parametrize("version", FORMATS)
def test_what_is_read_is_written_in_the_present_format(version, tmp_path):
    manifest = read_manifest(write(tmp_path, FORMATS[version], peft_config=TEXT))
    values = manifest.to_dict()
    assert values["version"] == 3 and values["config"]["metadata"] == {"peft": TEXT}
    assert "peft_config" not in values["config"]
    (tmp_path / "adapter.json").write_text(json.dumps(values))
    assert read_manifest(tmp_path / "adapter.json") == manifest


def test_a_text_that_is_no_string_is_refused(tmp_path):
    file = write(tmp_path, FORMATS[2], peft_config={"r": 2})
    with pytest.raises(CheckpointError, match=r"metadata\['peft'\]"):
        read_manifest(file)


def test_the_present_format_has_no_such_field(tmp_path):
    file = write(tmp_path, {**FORMATS[2], "version": 3}, peft_config=TEXT)
    with pytest.raises(CheckpointError, match="'peft_config'"):
        read_manifest(file)
