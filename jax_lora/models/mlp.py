"""The feed-forward block of a layer, with or without a gate."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_lora.models.activations import ACTIVATIONS


class MLP(nn.Module):
    """Compute down(act(up(x))), or down(act(gate(x)) * up(x)) with a gate.

    Reference:
      Shazeer, GLU variants (arXiv:2002.05202), equation 6.
    """

    dense: Callable[..., nn.Dense]  # makes a dense layer; see `dense_maker`
    names: tuple[str, ...]  # names of the dense layers: (up, down), or (gate, up, down)
    width: int  # intermediate channels
    activation: str  # a name in `ACTIVATIONS`
    bias: bool = False  # whether the dense layers have biases
    fused: bool = False  # whether the first of two dense layers is gate and up in one kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, hidden) -> the same shape."""
        *inner, down = self.names
        width = 2 * self.width if self.fused else self.width
        parts = [self.dense(width, use_bias=self.bias, name=name)(x) for name in inner]
        if self.fused:
            parts = jnp.split(parts[0], 2, axis=-1)
        # (gate, up), or (up,) alone
        parts = [
            checkpoint_name(part, name) for part, name in zip(parts, ("gate", "up"), strict=False)
        ]
        hidden = ACTIVATIONS[self.activation](parts[0])  # (batch, tokens, width)
        hidden = hidden * parts[1] if len(parts) == 2 else hidden
        return self.dense(x.shape[-1], use_bias=self.bias, name=down)(hidden)
