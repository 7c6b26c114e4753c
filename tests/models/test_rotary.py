"""Rotary embedding rotates, keeps norms, and makes scores depend on distances only."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.models import LlamaConfig, Phi3Config
from jax_lora.models.rotary import apply_rotary, rotary_angles

CONFIG = LlamaConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=32)
VECTOR = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)


def turned(position: int, config: LlamaConfig = CONFIG) -> jnp.ndarray:
    return apply_rotary(VECTOR, *rotary_angles(config, jnp.array([[position]])))


def test_position_zero_turns_nothing():
    np.testing.assert_array_equal(turned(0), VECTOR)


def test_lengths_are_kept():
    np.testing.assert_allclose(jnp.linalg.norm(turned(7)), jnp.linalg.norm(VECTOR), rtol=1e-6)


def test_products_depend_on_the_distance_only():
    near = jnp.vdot(turned(3), turned(5))
    far = jnp.vdot(turned(20), turned(22))
    np.testing.assert_allclose(near, far, rtol=1e-5)
    assert abs(float(near - jnp.vdot(turned(3), turned(6)))) > 1


def test_linear_scaling_slows_positions_by_its_factor():
    slow = LlamaConfig(**{**CONFIG.__dict__, "rope_scaling": {"type": "linear", "factor": 4.0}})
    np.testing.assert_allclose(turned(8, slow), turned(2), rtol=1e-5)


def test_dynamic_scaling_starts_only_beyond_the_trained_length():
    rope = {"rope_type": "dynamic", "factor": 2.0}
    dynamic = LlamaConfig(**{**CONFIG.__dict__, "rope_scaling": rope})
    np.testing.assert_allclose(turned(31, dynamic), turned(31), rtol=1e-5)
    assert not np.allclose(turned(32, dynamic), turned(32), rtol=1e-3)


def test_angles_stay_float32_for_a_bfloat16_model():
    x = VECTOR.astype(jnp.bfloat16)
    cos, sin = rotary_angles(CONFIG, jnp.array([[257]]))
    assert cos.dtype == sin.dtype == jnp.float32
    assert apply_rotary(x, cos, sin).dtype == jnp.bfloat16


@pytest.mark.parametrize("extra", [{"attention_factor": 2.0}, {"mscale": 1.0, "mscale_all_dim": 0}])
def test_yarn_attention_factor_is_read_or_derived(extra):
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, **extra}
    yarn = LlamaConfig(**{**CONFIG.__dict__, "rope_scaling": rope})
    cos, _ = rotary_angles(yarn, jnp.zeros((1, 1), jnp.int32))
    want = extra.get("attention_factor", 0.1 * np.log(8.0) + 1.0)
    np.testing.assert_allclose(cos, np.full((1, 1, 4), want), rtol=1e-6)


LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 8,
    "short_factor": (1.0, 1.0, 1.0, 2.0),
    "long_factor": (4.0, 4.0, 4.0, 4.0),
}
LONGROPE = LlamaConfig(**{**CONFIG.__dict__, "rope_scaling": LONG})


def test_longrope_uses_its_long_factors_once_a_position_passes_the_trained_length():
    factor = np.sqrt(1 + np.log(32 / 8) / np.log(8))  # on both cosines and sines
    np.testing.assert_allclose(turned(8, LONGROPE), turned(2) * factor, rtol=1e-5)
    (short, _), (plain, _) = (rotary_angles(c, jnp.array([[7]])) for c in (LONGROPE, CONFIG))
    np.testing.assert_allclose(short[..., :3], plain[..., :3] * factor, rtol=1e-5)
    slower, _ = rotary_angles(CONFIG, jnp.array([[3.5]]))
    np.testing.assert_allclose(short[..., 3], slower[..., 3] * factor, rtol=1e-6)


def test_longrope_factor_is_read_or_derived():
    given = {**LONG, "attention_factor": 3.0}
    config = LlamaConfig(**{**CONFIG.__dict__, "rope_scaling": given})
    cos, _ = rotary_angles(config, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, np.full((1, 1, 4), 3.0))


def test_channels_beyond_the_rotated_part_stay():
    config = Phi3Config(hidden_size=16, num_attention_heads=2, partial_rotary_factor=0.5)
    cos, sin = rotary_angles(config, jnp.array([[3]]))
    result = apply_rotary(VECTOR, cos, sin)
    np.testing.assert_array_equal(result[..., 4:], VECTOR[..., 4:])
    small = LlamaConfig(hidden_size=8, num_attention_heads=2)
    expected = apply_rotary(VECTOR[..., :4], *rotary_angles(small, jnp.array([[3]])))
    np.testing.assert_allclose(result[..., :4], expected, rtol=1e-6)
