"""Phi-3: the older names of longrope, and the settings that its files have as fields."""

import pytest

from jax_lora.errors import ConfigError
from jax_lora.models import Phi3Config

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("field", ["type", "rope_type"])
def test_every_name_of_longrope_means_longrope(name, field):
    config = Phi3Config(**SIZES, rope_scaling={field: name, **FACTORS})
    usual = Phi3Config(**SIZES, rope_scaling={"rope_type": "longrope", **FACTORS})
    assert config == usual
    assert hash(config) == hash(usual)
    assert config.rope_type == "longrope"


def test_the_trained_length_is_a_separate_field():
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 9, **FACTORS}
    config = Phi3Config(**SIZES, rope_scaling=scaling, original_max_position_embeddings=16)
    assert config.rope_scaling["original_max_position_embeddings"] == 16


def test_the_rotated_part_may_stand_among_the_rotary_settings():
    config = Phi3Config(**SIZES, rope_scaling={"partial_rotary_factor": 0.5})
    assert config.rotary_dim == 8
    assert config == Phi3Config(**SIZES, rope_scaling={}, partial_rotary_factor=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor\n  got:      0.0"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor\n  got:      2.0"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type\n  got:      'linear'",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", **FACTORS, "long_factor": [0.0] * 8}},
            "long_factor\n  got:      (0.0,",
        ),
    ],
)
def test_refusals_name_the_field(fields, message):
    with pytest.raises(ConfigError) as caught:
        Phi3Config(**{**SIZES, **fields})
    assert message in str(caught.value)
