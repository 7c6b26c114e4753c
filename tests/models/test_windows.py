"""Sliding windows: visible tokens, packed sequences, and layers of both kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.errors import ConfigError
from jax_lora.models import Gemma2, Gemma2Config, Gemma3Config, Mistral, MistralConfig, Qwen2Config
from jax_lora.models.decoder_config import FULL, SLIDING

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}
IDS = jnp.array([[5, 6, 7, 8, 9, 10, 11, 12]], jnp.int32)


def of_mistral(window, layers=1):
    model = Mistral(MistralConfig(**SIZES, num_hidden_layers=layers, sliding_window=window))
    return model, jax.jit(model.init)(jax.random.key(0), IDS)["params"]


def changed_by_the_first_token(model, params):
    """Which positions' logits depend on the token at position 0."""
    pair = jnp.concatenate([IDS.at[0, 0].set(token) for token in (3, 4)])
    one, other = jax.jit(model.apply)({"params": params}, pair)
    return (np.abs(one - other).max(-1) > 1e-6).tolist()


def test_a_window_includes_the_token_itself():
    assert changed_by_the_first_token(*of_mistral(3)) == [True] * 3 + [False] * 5


def test_each_layer_carries_it_a_window_further():
    assert changed_by_the_first_token(*of_mistral(3, layers=2)) == [True] * 5 + [False] * 3


def test_a_window_as_long_as_the_row_hides_nothing():
    assert changed_by_the_first_token(*of_mistral(8)) == [True] * 8


def test_windows_end_at_the_borders_of_packed_documents():
    model, params = of_mistral(3)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]], jnp.int32)
    apply = jax.jit(model.apply)
    together = apply({"params": params}, IDS, positions=positions, segment_ids=segments)
    second = apply({"params": params}, IDS[:, 3:])
    np.testing.assert_allclose(together[:, 3:], second, atol=1e-5)


def test_mixed_layers_of_one_stack_see_differently():
    config = Gemma2Config(**SIZES, num_hidden_layers=2, sliding_window=2)
    model = Gemma2(config)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    assert changed_by_the_first_token(model, params) == [True] * 8
    config = dataclasses.replace(config, layer_types=(SLIDING, SLIDING))
    seen = changed_by_the_first_token(model.clone(config=config), params)
    assert seen == [True] * 3 + [False] * 5


@pytest.mark.parametrize(
    ("config", "fields", "types"),
    [
        (Qwen2Config, {}, "fff"),
        (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}, "fss"),
        (Gemma2Config, {}, "sfs"),
        (Gemma3Config, {"sliding_window_pattern": 3}, "ssf"),
    ],
)
def test_usual_patterns_of_layers(config, fields, types):
    made = config(num_hidden_layers=3, **fields)
    assert made.layer_types == tuple({"f": FULL, "s": SLIDING}[t] for t in types)


def test_layers_of_gemma_3_with_a_window_have_a_separate_rotary_base():
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = Gemma3Config(num_hidden_layers=6, rope_local_base_freq=5.0, rope_scaling=scaling)
    first, last = config.layer_kinds[0], config.layer_kinds[-1]
    assert (first.window, first.rope.rope_theta, first.rope.rope_type) == (4096, 5.0, "default")
    assert (last.window, last.rope.rope_theta, last.rope.rope_type) == (None, 1e6, "linear")


def test_layers_with_a_window_need_its_size():
    with pytest.raises(ConfigError, match="a positive integer, for sliding_attention layers"):
        Gemma2Config(sliding_window=None)
