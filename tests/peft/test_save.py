"""Saved adapters are byte for byte those of PEFT."""

import dataclasses
import json

import numpy as np
import pytest

import jax_lora as jl

from .peft_cases import CASES, FOLDERS, load_case

FILES = ("adapter_config.json", "adapter_model.safetensors")


def with_sorted_names(text: str) -> dict:
    """PEFT writes sets in whatever order; ours are sorted."""
    config = json.loads(text)
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config[name], list):
            config[name] = sorted(config[name])
    return config


@pytest.mark.parametrize("case", CASES)
def test_saving_a_loaded_adapter_reproduces_its_files(case, tmp_path):
    model, variables, adapter = load_case(case, dtype=None)
    jl.peft.save(tmp_path / "one", adapter, names=model.hf_names, base=variables)
    config, weights = ((FOLDERS / case / name).read_bytes() for name in FILES)
    assert (tmp_path / "one" / FILES[1]).read_bytes() == weights
    written = (tmp_path / "one" / FILES[0]).read_text()
    assert written == json.dumps(with_sorted_names(config.decode()), indent=2, sort_keys=True)
    again = jl.peft.load(tmp_path / "one", variables, names=model.hf_names, dtype=None)
    jl.peft.save(tmp_path / "two", again, names=model.hf_names, base=variables)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_a_new_configuration_means_the_same_as_the_one_that_was_read(case, tmp_path):
    model, variables, adapter = load_case(case)
    config = dataclasses.replace(adapter.config, metadata={})
    fresh = dataclasses.replace(adapter, config=config)
    jl.peft.save(tmp_path, fresh, names=model.hf_names, base=variables)
    again = jl.peft.load(tmp_path, variables, names=model.hf_names)
    assert again.pairs.keys() == adapter.pairs.keys()
    for path, pair in adapter.pairs.items():
        np.testing.assert_array_equal(again.pairs[path].a, pair.a)
        np.testing.assert_array_equal(again.pairs[path].b, pair.b)
        assert again.pairs[path].ranks == pair.ranks
        np.testing.assert_allclose(again.pairs[path].scale, pair.scale, rtol=1e-12)
    assert again.config == adapter.config
