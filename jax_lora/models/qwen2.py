"""Qwen2 and Qwen2.5: Llama's layer with biases on queries, keys and values.

Reference:
    Yang et al. (arXiv:2407.10671), section 2.2.
"""

from __future__ import annotations

import dataclasses

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import PreNormLayer
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json, nullable
from jax_lora.models.layout import Layout
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.norms import RMSNorm
from jax_lora.models.windows import FULL, SLIDING, MixedLayersConfig

__all__ = ["Qwen2", "Qwen2Config", "QwenWindowConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenWindowConfig(MixedLayersConfig):
    """Qwen's way to say which layers see a window: those from `max_window_layers` on, if any do."""

    use_sliding_window: bool = False
    sliding_window: int | None = 4096  # of no effect without use_sliding_window
    max_window_layers: int = 28

    @property
    def window(self) -> int | None:
        """How many tokens back the layers with a window see, each token itself included."""
        return self.sliding_window if self.use_sliding_window else None

    def usual_layer_types(self) -> tuple[str, ...]:
        """What the layers are where `layer_types` does not say."""
        full = self.num_hidden_layers if self.window is None else self.max_window_layers
        return tuple(FULL if i < full else SLIDING for i in range(self.num_hidden_layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(QwenWindowConfig):
    """Sizes and switches of a Qwen2, named as in Hugging Face's `Qwen2Config`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation,
        a rotary scaling or a kind of layer that is not implemented.

    Example:
      >>> config = Qwen2Config(num_hidden_layers=3, use_sliding_window=True, max_window_layers=2)
      >>> config.layer_types
      ('full_attention', 'full_attention', 'sliding_attention')
    """

    vocab_size: int = 151936
    intermediate_size: int = 22016
    max_position_embeddings: int = 32768


class Qwen2Layer(PreNormLayer):
    """Attention, then the gated feed-forward part, each on a normed copy of x."""

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.attn = Attention(c, dtype, bias=True)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.mlp = GatedMLP(c, dtype)


class Qwen2(Decoder):
    """Qwen2 decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = Qwen2Config(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                      num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Qwen2(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["q_proj"]["bias"].shape
      (2, 8)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Qwen2's layer."""
        return Qwen2Layer

    def layout(self) -> Layout:
        """Where a Qwen2's parameters stand in its files."""
        return self.usual_layout(biased=("attn/q_proj", "attn/k_proj", "attn/v_proj"))


FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    config=Qwen2Config,
    module=Qwen2,
    to_json=decoder_json,
    fields=nullable("sliding_window"),
    redundant=ROTARY_TABLES,
)
