"""Gemma: scales kept as their difference from 1, embeddings multiplied by sqrt(hidden), GeGLU.

Reference:
    Gemma Team (arXiv:2403.08295), section 2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import PreNormLayer
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.norms import RMSNorm

__all__ = ["Gemma", "GemmaConfig", "GemmaDecoder", "gemma_norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """Sizes and switches of a Gemma, named as in Hugging Face's `GemmaConfig`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a rotary scaling that is not implemented.

    Example:
      >>> GemmaConfig(hidden_act="gelu").hidden_act  # what the first files say and do not mean
      'gelu_pytorch_tanh'
    """

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        if self.hidden_act == "gelu":
            object.__setattr__(self, "hidden_act", "gelu_pytorch_tanh")
        super().__post_init__()


def gemma_norm(config: DecoderConfig, param_dtype: Any) -> RMSNorm:
    """Gemma's norm: multiplied by 1 + scale in float32; in no module yet."""
    return RMSNorm(
        config.rms_norm_eps, offset=1.0, wide_scale=True, param_dtype=param_dtype, parent=None
    )


class GemmaLayer(PreNormLayer):
    """Attention, then the gated feed-forward part, each on a normed copy of x."""

    config: GemmaConfig

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = gemma_norm(c, dtype)
        self.attn = Attention(c, dtype, bias=c.attention_bias, out_bias=c.attention_bias)
        self.post_attention_norm = gemma_norm(c, dtype)
        self.mlp = GatedMLP(c, dtype)


class GemmaDecoder(Decoder):
    """What Gemma, Gemma 2 and Gemma 3 share of the skeleton."""

    def final_norm(self) -> RMSNorm:
        """The norm behind the last layer."""
        return gemma_norm(self.config, self.param_dtype)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """(batch, tokens) integers -> (batch, tokens, hidden): table rows times sqrt(hidden)."""
        x = self.embed_tokens(input_ids)
        return x * jnp.float32(math.sqrt(self.config.hidden_size)).astype(x.dtype)


class Gemma(GemmaDecoder):
    """Gemma decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = GemmaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, head_dim=4,
      ...                      num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
      >>> model, ids = Gemma(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["k_proj"]["kernel"].shape
      (2, 8, 4)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Gemma's layer."""
        return GemmaLayer


FAMILY = Family(
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    config=GemmaConfig,
    module=Gemma,
    to_json=decoder_json,
    neutral={
        "hidden_activation": (None, "gelu_pytorch_tanh"),
        "use_bidirectional_attention": (None, False),
    },
    redundant=ROTARY_TABLES,
)
