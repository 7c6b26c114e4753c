"""Gemma: rounding, scales of norms, and the factor on embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.models import Gemma, GemmaConfig
from jax_lora.models.decoder import decoder_norm
from jax_lora.models.norms import RMSNorm

CONFIG = GemmaConfig(
    vocab_size=8,
    hidden_size=3072,
    intermediate_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    head_dim=2,
)


def test_norms_multiply_by_one_plus_scale_before_they_round():
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    scale = jax.random.normal(jax.random.key(1), (64,)).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float32)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    once = jnp.asarray(normed * (1 + np.asarray(scale, np.float32))).astype(jnp.bfloat16)
    given = decoder_norm(CONFIG, Gemma.design, jnp.bfloat16).apply({"params": {"scale": scale}}, x)
    np.testing.assert_array_equal(given, once)
    twice = RMSNorm(1e-6, offset=1.0).apply({"params": {"scale": scale}}, x)
    assert (np.asarray(twice) != np.asarray(once)).any()  # which bfloat16 can tell apart


def test_embeddings_are_multiplied_by_the_root_of_their_width_as_bfloat16_has_it():
    model = Gemma(CONFIG)
    ids = jnp.arange(4, dtype=jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids[None])
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), shapes["params"])
    x = model.apply({"params": params}, ids, method="embed")
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x.astype(jnp.float32), np.full((4, 3072), 55.5))  # not 55.43


def test_the_activation_is_the_tanh_form_under_every_name():
    for name in ("gelu", "gelu_pytorch_tanh"):
        config = dataclasses.replace(CONFIG, hidden_act=name)
        assert config == CONFIG
