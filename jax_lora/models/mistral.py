"""Mistral: Llama's layer, with attention to a window of the last tokens.

Reference:
    Jiang et al. (arXiv:2310.06825), section 2.
"""

from __future__ import annotations

import dataclasses

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import PreNormLayer
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json, nullable
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.norms import RMSNorm
from jax_lora.models.windows import WindowConfig

__all__ = ["Mistral", "MistralConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowConfig):
    """Sizes and switches of a Mistral, named as in Hugging Face's `MistralConfig`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a rotary scaling that is not implemented.

    Example:
      >>> MistralConfig(sliding_window=None).window  # as later versions of Mistral 7B
    """

    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096


class MistralLayer(PreNormLayer):
    """Attention, then the gated feed-forward part, each on a normed copy of x."""

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.attn = Attention(c, dtype)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.mlp = GatedMLP(c, dtype)


class Mistral(Decoder):
    """Mistral decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = MistralConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                        num_hidden_layers=2, num_attention_heads=2,
      ...                        num_key_value_heads=1, sliding_window=2)
      >>> model, ids = Mistral(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["k_proj"]["kernel"].shape
      (2, 8, 4)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Mistral's layer."""
        return MistralLayer


FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    config=MistralConfig,
    module=Mistral,
    to_json=decoder_json,
    fields=nullable("sliding_window"),
    redundant=ROTARY_TABLES,
)
