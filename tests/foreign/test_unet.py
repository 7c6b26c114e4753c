"""A diffusion U-Net: time embedding, strided and transposed convolutions, attention, skips."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.foreign.model_cases import assert_runs_adapted, data, drawn

IMAGE = data(2, 4, 4, 3)  # (batch, height, width, channels)
TIME = jnp.array([0.1, 0.7])


class ResidualBlock(nn.Module):
    """Two convolutions, moved by the time, around a projected skip."""

    channels: int

    @nn.compact
    def __call__(self, x, time):
        h = nn.Conv(self.channels, (3, 3))(nn.silu(nn.GroupNorm(2)(x)))
        h = h + nn.Dense(self.channels, name="time")(nn.silu(time))[:, None, None]
        h = nn.Conv(self.channels, (3, 3))(nn.silu(nn.GroupNorm(2)(h)))
        return h + nn.Conv(self.channels, (1, 1), name="skip")(x)


class UNet(nn.Module):
    """One level down and up again, with attention at the bottom."""

    resize: bool

    @nn.compact
    def __call__(self, x, time):
        angles = time[:, None] * (10.0 ** jnp.arange(4.0))[None]
        time = nn.Dense(8, name="time")(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        top = ResidualBlock(4, name="down")(nn.Conv(4, (3, 3), name="stem")(x), time)
        h = nn.Conv(6, (3, 3), strides=2, name="shrink")(top)
        tokens = nn.GroupNorm(2)(h).reshape(len(h), -1, 6)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(tokens).reshape(h.shape)
        if self.resize:
            h = jax.image.resize(h, (*top.shape[:3], 6), "nearest")
            h = nn.Conv(4, (3, 3), name="grow")(h)
        else:
            h = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="grow")(h)
        h = ResidualBlock(4, name="up")(jnp.concatenate([h, top], axis=-1), time)
        return nn.Conv(3, (3, 3), name="head")(h)


@pytest.mark.slow
@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize("resize", [False, True], ids=["transposed", "resized"])
def test_diffusion_unet(resize):
    module = UNet(resize)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), IMAGE, TIME))
    assert_runs_adapted(module.apply, variables, IMAGE, TIME)
