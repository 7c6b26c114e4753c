"""Gemma 2: soft caps change the logits, and are optional."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.models import load
from jax_lora.models.activations import soft_cap
from jax_lora.models.attention import attend

FIXTURE = Path(__file__).parent.parent / "fixtures" / "gemma2" / "capped"


def test_a_cap_squeezes_and_keeps_the_dtype():
    x = jnp.array([0.01, -1e4, 30.0], jnp.bfloat16)
    capped = soft_cap(x, 30.0)
    assert capped.dtype == jnp.bfloat16
    np.testing.assert_allclose(capped.astype(jnp.float32), [0.01, -30, 22.8476], rtol=5e-3)
    assert soft_cap(x, None) is x


@pytest.mark.parametrize("field", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_each_cap_changes_the_logits(field):
    model, params = load(FIXTURE)
    ids = jnp.arange(12, dtype=jnp.int32)[None]
    uncapped = model.clone(config=dataclasses.replace(model.config, **{field: None}))
    run = jax.jit(lambda p: [m.apply({"params": p}, ids) for m in (model, uncapped)])
    capped, free = run(params)
    assert np.abs(capped).max() < 3.0
    assert np.abs(capped - free).max() > 0.05


def test_a_very_high_soft_cap_does_not_change_attention():
    draw = np.random.default_rng(0).standard_normal
    shapes = ((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))
    q, k, v = (jnp.asarray(draw(shape), jnp.float32) for shape in shapes)
    seen = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    run = jax.jit(functools.partial(attend, scale=0.3), static_argnames="soft_cap")
    for mask in (None, seen):
        capped = run(q, k, v, mask, soft_cap=1e5)
        np.testing.assert_allclose(capped, run(q, k, v, mask), atol=1e-5)
