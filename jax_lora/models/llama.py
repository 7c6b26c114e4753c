"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Reference:
    Touvron et al. (arXiv:2302.13971); Grattafiori et al., Llama 3 (arXiv:2407.21783).
"""

from __future__ import annotations

import dataclasses

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import PreNormLayer
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json
from jax_lora.models.layout import Layout
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.norms import RMSNorm

__all__ = ["Llama", "LlamaConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Sizes and switches of a Llama, named as in Hugging Face's `LlamaConfig`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a rotary scaling that is not implemented.

    Example:
      >>> LlamaConfig(hidden_size=64, num_attention_heads=4).head_dim
      16
    """

    attention_bias: bool = False
    mlp_bias: bool = False


class LlamaLayer(PreNormLayer):
    """Attention, then the gated feed-forward part, each on a normed copy of x."""

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.attn = Attention(c, dtype, bias=c.attention_bias, out_bias=c.attention_bias)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.mlp = GatedMLP(c, dtype, bias=c.mlp_bias)


class Llama(Decoder):
    """Llama decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                      num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Llama(config), jnp.array([[3, 1, 4]])
      >>> params = model.init(jax.random.key(0), ids)["params"]
      >>> model.apply({"params": params}, ids).shape
      (1, 3, 16)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Llama's layer."""
        return LlamaLayer

    def layout(self) -> Layout:
        """Where a Llama's parameters stand in its files."""
        attention, mlp = self.config.attention_bias, self.config.mlp_bias
        return self.usual_layout(biased=("attn",) * attention + ("mlp",) * mlp)


FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    config=LlamaConfig,
    module=Llama,
    to_json=decoder_json,
    harmless=("pretraining_tp",),
    redundant=ROTARY_TABLES,
)
