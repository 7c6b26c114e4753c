"""Qwen3: queries and keys are normalized, so the scale of their kernels has no effect."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.models import Qwen3Config, load

FIXTURE = Path(__file__).parent.parent / "fixtures" / "qwen3" / "untied"


def test_longer_queries_and_keys_change_nothing():
    model, params = load(FIXTURE)
    attn = params["layers"]["attn"]
    longer = {name: {"kernel": 100 * attn[name]["kernel"]} for name in ("q_proj", "k_proj")}
    longer = {**params, "layers": {**params["layers"], "attn": {**attn, **longer}}}
    ids = jnp.arange(12, dtype=jnp.int32)[None]
    run = jax.jit(model.apply)
    np.testing.assert_allclose(
        run({"params": longer}, ids), run({"params": params}, ids), atol=1e-4
    )


def test_heads_have_128_channels_whatever_the_width():
    assert Qwen3Config(hidden_size=1024, num_attention_heads=16).head_dim == 128
