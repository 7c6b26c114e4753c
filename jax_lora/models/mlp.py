"""The gated feed-forward block of a decoder layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.checkpoint_model import linear
from jax_lora.models.decoder_config import DecoderConfig

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """Compute down(act(gate(x)) * up(x)), with gate and up in one kernel if `fused`.

    Reference:
      Shazeer, GLU variants (arXiv:2002.05202), equation 6.
    """

    config: DecoderConfig
    param_dtype: Any
    bias: bool = False
    fused: bool = False

    def setup(self):  # noqa: D102  Linen's hook
        c = self.config
        if self.fused:
            self.gate_up_proj = linear(c, 2 * c.intermediate_size, self.bias, self.param_dtype)
        else:
            self.gate_proj = linear(c, c.intermediate_size, self.bias, self.param_dtype)
            self.up_proj = linear(c, c.intermediate_size, self.bias, self.param_dtype)
        self.down_proj = linear(c, c.hidden_size, self.bias, self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, hidden) -> the same shape."""
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)  # (b, t, intermediate) each
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ACTIVATIONS[self.config.hidden_act](gate) * up)
