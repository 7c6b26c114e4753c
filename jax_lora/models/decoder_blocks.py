"""The two ways in which a decoder's layer joins attention and feed-forward part to its input.

An architecture's own layer makes the parts in its `setup`, under the names used here.
"""

from __future__ import annotations

import jax

from jax_lora.models.attention import Context, Memory
from jax_lora.models.decoder import DecoderLayer

__all__ = ["QK_NORM_NAMES", "PreNormLayer", "SandwichLayer"]

# The norms of queries and keys, in a layer whose attention has them.
QK_NORM_NAMES = {"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}


class PreNormLayer(DecoderLayer):
    """Each part works on a normed copy of x, and what it says is added to x."""

    norm_names = {
        "input_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
    }

    def block(
        self, x: jax.Array, context: Context, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None]:
        """x: (batch, tokens, hidden) -> the same shape, and the layer's cache if it has one."""
        attended, memory = self.attn(self.input_norm(x), context, memory)
        x = x + attended
        return x + self.mlp(self.post_attention_norm(x)), memory


class SandwichLayer(DecoderLayer):
    """The same, with a norm behind each part too.

    Reference:
      Gemma 2 (arXiv:2408.00118), section 2.
    """

    norm_names = {
        "input_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_feedforward_norm": "pre_feedforward_layernorm",
        "post_feedforward_norm": "post_feedforward_layernorm",
    }

    def block(
        self, x: jax.Array, context: Context, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None]:
        """x: (batch, tokens, hidden) -> the same shape, and the layer's cache if it has one."""
        attended, memory = self.attn(self.input_norm(x), context, memory)
        x = x + self.post_attention_norm(attended)
        fed = self.mlp(self.pre_feedforward_norm(x))
        return x + self.post_feedforward_norm(fed), memory
