"""Every error of `LlamaConfig` names the field, the value and the expected values."""

import pytest

from jax_lora.errors import ConfigError
from jax_lora.models import LlamaConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size\n  got:      0\n  expected: a positive integer"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers\n  got:      2.5"),
        ({"vocab_size": True}, "vocab_size\n  got:      True"),
        ({"num_attention_heads": "8"}, "num_attention_heads\n  got:      '8'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps\n  got:      nan"),
        ({"rope_theta": -1.0}, "rope_theta\n  got:      -1.0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads\n  got:      5\n  expected: a divisor"),
        ({"head_dim": 3}, "head_dim\n  got:      3\n  expected: an even number"),
        ({"hidden_act": "xielu"}, "hidden_act\n  got:      'xielu'"),
        (
            {"rope_scaling": {"rope_type": "spiral"}},
            "one of default, linear, dynamic, yarn, llama3",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor\n  got:      None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_scaling: high_freq_factor\n  got:      None",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor\n  got:      0.5",
        ),
    ],
)
def test_refusals_name_the_field(fields, message):
    with pytest.raises(ConfigError) as caught:
        LlamaConfig(**fields)
    assert message in str(caught.value)


def test_derived_sizes_are_filled_in():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    assert (config.head_dim, config.num_key_value_heads, config.rope_type) == (16, 4, "default")
