"""Gemma 3: two rotary settings in one configuration, in old and new formats."""

import json

import pytest

from jax_lora.models import Gemma3Config
from jax_lora.models.families import FAMILIES
from jax_lora.models.read_config import arguments_to_config

FAMILY = FAMILIES["gemma3_text"]
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("scaling", [None, LINEAR])
@pytest.mark.parametrize("local", [None, LINEAR])
def test_both_rotary_settings_are_written_and_read_again(scaling, local):
    config = Gemma3Config(
        rope_theta=5e5, rope_scaling=scaling, rope_local_base_freq=7.0, rope_local_scaling=local
    )
    written = json.loads(json.dumps(FAMILY.to_json(config)))
    assert written["rope_parameters"]["sliding_attention"]["rope_theta"] == 7.0
    assert arguments_to_config(written, FAMILY) == config


def test_layers_with_a_window_may_have_a_separate_scaling():
    config = Gemma3Config(rope_local_scaling=LINEAR)
    first, last = config.layer_kinds[0].rope, config.layer_kinds[5].rope
    assert (first.rope_type, last.rope_type) == ("linear", "default")
    assert hash(config.layer_kinds[0]) == hash(config.layer_kinds[1])


def test_settings_left_out_are_the_published_ones():
    config = arguments_to_config({"rope_parameters": {"full_attention": {}}}, FAMILY)
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 10000.0)
