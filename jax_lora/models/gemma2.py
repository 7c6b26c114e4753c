"""Gemma 2: soft caps on scores and logits, a norm before and behind each part, mixed layers.

Reference:
    Gemma Team (arXiv:2408.00118), section 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jax_lora.models.activations import soft_cap
from jax_lora.models.attention import Attention
from jax_lora.models.decoder import DecoderLayer
from jax_lora.models.decoder_blocks import SandwichLayer
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json, nullable
from jax_lora.models.gemma import GemmaDecoder, gemma_norm
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.windows import FULL, SLIDING, MixedLayersConfig

__all__ = ["CappedDecoder", "Gemma2", "Gemma2Config", "Gemma2Layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(MixedLayersConfig):
    """Sizes and switches of a Gemma 2, named as in Hugging Face's `Gemma2Config`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation,
        a rotary scaling or a kind of layer that is not implemented.

    Example:
      >>> Gemma2Config(num_hidden_layers=3).layer_types
      ('sliding_attention', 'full_attention', 'sliding_attention')
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"  # hidden_act follows it, whatever the file says
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        object.__setattr__(self, "hidden_act", self.hidden_activation)
        super().__post_init__()
        caps = ("final_logit_softcapping", "attn_logit_softcapping")
        given = [name for name in caps if getattr(self, name) is not None]
        self.check_positive(("query_pre_attn_scalar", *given))

    def usual_layer_types(self) -> tuple[str, ...]:
        """Every other layer sees a window, the first among them."""
        return tuple(FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers))


class Gemma2Layer(SandwichLayer):
    """Attention, then the gated feed-forward part, each between two norms."""

    config: Any  # Gemma 2's or Gemma 3's

    def attention(self) -> Attention:
        """Attention with soft-capped scores."""
        c = self.config
        return Attention(
            c,
            self.param_dtype,
            bias=c.attention_bias,
            out_bias=c.attention_bias,
            scale=c.query_pre_attn_scalar**-0.5,
            soft_cap=c.attn_logit_softcapping,
        )

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = gemma_norm(c, dtype)
        self.attn = self.attention()
        self.post_attention_norm = gemma_norm(c, dtype)
        self.pre_feedforward_norm = gemma_norm(c, dtype)
        self.mlp = GatedMLP(c, dtype)
        self.post_feedforward_norm = gemma_norm(c, dtype)


class CappedDecoder(GemmaDecoder):
    """Gemma's skeleton with a soft cap on the logits."""

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Final hidden states (..., hidden) -> logits (..., vocabulary)."""
        return soft_cap(super().unembed(hidden), self.config.final_logit_softcapping)


class Gemma2(CappedDecoder):
    """Gemma 2 decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = Gemma2Config(vocab_size=16, hidden_size=8, intermediate_size=16, head_dim=4,
      ...                       num_hidden_layers=2, num_attention_heads=2,
      ...                       num_key_value_heads=1, sliding_window=2)
      >>> model, ids = Gemma2(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["post_feedforward_norm"]["scale"].shape
      (2, 8)
    """

    config: Gemma2Config

    def layer_class(self) -> type[DecoderLayer]:
        """Gemma 2's layer."""
        return Gemma2Layer


FAMILY = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    config=Gemma2Config,
    module=Gemma2,
    to_json=decoder_json,
    fields=nullable("sliding_window", "final_logit_softcapping", "attn_logit_softcapping"),
    neutral={"use_bidirectional_attention": (None, False)},
    harmless=("cache_implementation", "sliding_window_size"),
    redundant=ROTARY_TABLES,
)
