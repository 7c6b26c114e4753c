"""Qwen3: every query and key is normed over its channels before it is rotated.

Reference:
    Yang et al. (arXiv:2505.09388), section 2.
"""

from __future__ import annotations

import dataclasses

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import QK_NORM_NAMES, PreNormLayer
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json, nullable
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.norms import RMSNorm
from jax_lora.models.qwen2 import QwenWindowConfig

__all__ = ["Qwen3", "Qwen3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(QwenWindowConfig):
    """Sizes and switches of a Qwen3, named as in Hugging Face's `Qwen3Config`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation,
        a rotary scaling or a kind of layer that is not implemented.

    Example:
      >>> Qwen3Config(hidden_size=1024, num_attention_heads=16).head_dim
      128
    """

    vocab_size: int = 151936
    intermediate_size: int = 22016
    head_dim: int = 128
    max_position_embeddings: int = 32768
    attention_bias: bool = False


class Qwen3Layer(PreNormLayer):
    """Attention, then the gated feed-forward part, each on a normed copy of x."""

    config: Qwen3Config

    norm_names = PreNormLayer.norm_names | QK_NORM_NAMES

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.attn = Attention(
            c,
            dtype,
            bias=c.attention_bias,
            out_bias=c.attention_bias,
            qk_norm=RMSNorm(c.rms_norm_eps, param_dtype=dtype, parent=None),
        )
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.mlp = GatedMLP(c, dtype)


class Qwen3(Decoder):
    """Qwen3 decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = Qwen3Config(vocab_size=16, hidden_size=8, intermediate_size=16, head_dim=4,
      ...                      num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
      >>> model, ids = Qwen3(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["q_norm"]["scale"].shape
      (2, 4)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Qwen3's layer."""
        return Qwen3Layer


FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config=Qwen3Config,
    module=Qwen3,
    to_json=decoder_json,
    fields=nullable("sliding_window"),
    redundant=ROTARY_TABLES,
)
