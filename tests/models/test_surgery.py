"""Untied models, models with repeated layers, and models with another vocabulary."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.errors import ModelError
from jax_lora.models import load, replicate_layers, resize_vocab, save, untie

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llama"
IDS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def tied():
    return load(FIXTURES / "tied")


def logits(model, params):
    return jax.jit(model.apply)({"params": params}, IDS)


def test_an_untied_model_computes_the_same_with_a_separate_head(tied, tmp_path):
    model, params = untie(*tied)
    np.testing.assert_allclose(logits(model, params), logits(*tied), atol=1e-6)
    np.testing.assert_array_equal(
        params["lm_head"]["kernel"], tied[1]["embed_tokens"]["embedding"].T
    )
    save(tmp_path, model, params)
    assert load(tmp_path)[0] == model
    assert "lm_head" not in tied[1]  # the arguments are unchanged


def test_untying_an_untied_model_is_refused(tied):
    with pytest.raises(ModelError, match="a Llama without a tied output head"):
        untie(*untie(*tied))


def test_replicated_layers_stand_in_the_order_of_the_ranges(tied, tmp_path):
    model, params = replicate_layers(*tied, [[0, 2], [1, 2]])
    kernel = tied[1]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up_proj"]["kernel"], kernel[np.array([0, 1, 1])]
    )
    save(tmp_path, model, params)
    np.testing.assert_array_equal(logits(*load(tmp_path)), logits(model, params))


@pytest.mark.parametrize("ranges", [[[0, 3]], [[1, 1]], [[-1, 2]], [[0]], []])
def test_ranges_outside_the_model_are_refused(tied, ranges):
    with pytest.raises(ModelError, match="replicate_layers"):
        replicate_layers(*tied, ranges)


def test_a_larger_vocabulary_does_not_change_the_logits_of_old_tokens(tied):
    for model, params in (tied, untie(*tied)):
        larger = logits(*resize_vocab(model, params, 35))
        assert larger.shape == (2, 6, 35)
        np.testing.assert_allclose(larger[..., :32], logits(model, params), atol=1e-6)


def test_a_smaller_vocabulary_leaves_the_last_tokens_off(tied):
    smaller = logits(*resize_vocab(*tied, 20))
    np.testing.assert_allclose(smaller, logits(*tied)[..., :20], atol=1e-6)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_vocabulary_of_no_size_is_refused(tied, size):
    with pytest.raises(ModelError, match="a positive integer"):
        resize_vocab(*tied, size)
