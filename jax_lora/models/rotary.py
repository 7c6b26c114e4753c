"""Rotary position embedding, and its scalings to contexts longer than the trained length.

A head's channels are pairs that turn by ``position * frequency``. Every scaling only changes the
frequencies (yarn and longrope also multiply the result by a factor). All of it is float32,
whatever the model's dtype: bfloat16 cannot hold large positions.

References:
    Su et al., RoFormer, https://arxiv.org/abs/2104.09864 (equation 34).
    Peng et al., YaRN, https://arxiv.org/abs/2309.00071 (section 3).
    Ding et al., LongRoPE, https://arxiv.org/abs/2402.13753 (section 3).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.models.decoder_config import DecoderConfig


def rotary_angles(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute cosines and sines of the angles by which each position's channels are rotated.

    Positions (batch, tokens) give two float32 arrays (batch, tokens, rotary_dim / 2).

    Example:
      >>> import jax.numpy as jnp
      >>> config = DecoderConfig(hidden_size=8, num_attention_heads=2)
      >>> cos, sin = rotary_angles(config, jnp.arange(3)[None])
      >>> cos.shape
      (1, 3, 2)
    """
    frequencies, factor = _frequencies(config, positions)  # (rotary_dim / 2,), float
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    factor = jnp.float32(factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor  # (batch, tokens, rotary_dim / 2)


def query_scale(config: DecoderConfig, positions: jax.Array) -> jax.Array | None:
    """Compute the factor by which each query's scores grow beyond the trained length.

    (batch, tokens) float32, which is 1 up to that length; None without `llama_4_scaling_beta`.
    """
    beta, scaling = config.llama_4_scaling_beta, config.rope_scaling or {}
    if beta is None:
        return None
    trained = jnp.float32(scaling["original_max_position_embeddings"])
    times = jnp.floor(positions.astype(jnp.float32) / trained)
    return jnp.float32(1.0) + jnp.float32(beta) * jnp.log(jnp.float32(1.0) + times)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the channel pairs (i, i + rotary_dim / 2) of every head; later channels are unchanged.

    x is (batch, tokens, heads, head_dim); cosines and sines are from `rotary_angles`.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # one angle for all heads
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)  # (b, t, h, head_dim)


def _frequencies(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, float]:
    """Compute radians per position of each channel pair, and the factor on cosines and sines."""
    scaling = config.rope_scaling or {}
    kind = config.rope_type
    if kind == "dynamic":
        return _dynamic(config, scaling, positions), 1.0
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    plain = 1.0 / config.rope_theta**exponents
    if kind == "linear":
        return jnp.asarray(plain / scaling["factor"], jnp.float32), 1.0
    if kind == "llama3":
        return jnp.asarray(_llama3(plain, scaling), jnp.float32), 1.0
    given = scaling.get("attention_factor")
    if kind == "yarn":
        frequencies = jnp.asarray(_yarn(plain, config, scaling), jnp.float32)
        return frequencies, _yarn_attention_factor(scaling) if given is None else given
    if kind == "longrope":
        frequencies = _longrope(plain, scaling, positions)
        return frequencies, _longrope_attention_factor(config, scaling) if given is None else given
    return jnp.asarray(plain, jnp.float32), 1.0


def _dynamic(config: DecoderConfig, scaling: Mapping[str, Any], positions: jax.Array) -> jax.Array:
    """Increase theta with the batch's longest position, beyond the trained length."""
    dim, trained = config.rotary_dim, config.max_position_embeddings
    length = jnp.maximum(positions.max() + 1, trained).astype(jnp.float32)
    factor = jnp.float32(scaling["factor"])
    growth = factor * length / jnp.float32(trained) - (factor - jnp.float32(1.0))
    growth = growth ** jnp.float32(dim / (dim - 2))
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / jnp.float32(dim)
    return jnp.float32(1.0) / (jnp.float32(config.rope_theta) * growth) ** exponent


def _llama3(plain: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / scaling["factor"]


def _yarn(plain: np.ndarray, config: DecoderConfig, scaling: Mapping[str, Any]) -> np.ndarray:
    """Keep frequencies that turn often within the trained length, divide the others by `factor`."""
    low, high = _yarn_ramp_ends(config, scaling)
    # A ramp of width zero would divide by zero; with a thousandth of a channel it is a step.
    width = (high - low) or 0.001
    stretch = np.clip((np.arange(len(plain)) - low) / width, 0.0, 1.0)
    return (1.0 - stretch) * plain + stretch * plain / scaling["factor"]


def _yarn_ramp_ends(config: DecoderConfig, scaling: Mapping[str, Any]) -> tuple[float, float]:
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    dim = config.rotary_dim

    def channel(turns: float) -> float:
        """Find the channel that makes `turns` turns over the trained length."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = channel(scaling.get("beta_fast") or 32)
    high = channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    factor = scaling["factor"]
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(plain: np.ndarray, scaling: Mapping[str, Any], positions: jax.Array) -> jax.Array:
    """Divide each pair's frequency by its factor; the long list is for long sequences."""
    short, long = (
        jnp.asarray(plain / np.array(scaling[name]), jnp.float32)
        for name in ("short_factor", "long_factor")
    )
    return jnp.where(positions.max() >= scaling["original_max_position_embeddings"], long, short)


def _longrope_attention_factor(config: DecoderConfig, scaling: Mapping[str, Any]) -> float:
    trained = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or config.max_position_embeddings / trained
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
