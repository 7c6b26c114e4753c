"""Gemma 3, the text model: most layers see a window, and have a rotary base of their own.

Reference:
    Gemma Team (arXiv:2503.19786), section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_lora.errors import ConfigError, format_error
from jax_lora.models.attention import Attention
from jax_lora.models.decoder import DecoderLayer
from jax_lora.models.decoder_blocks import QK_NORM_NAMES
from jax_lora.models.decoder_config import LayerKind, frozen_settings
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json, nullable
from jax_lora.models.gemma import gemma_norm
from jax_lora.models.gemma2 import CappedDecoder, Gemma2Layer
from jax_lora.models.windows import FULL, SLIDING, MixedLayersConfig

__all__ = ["Gemma3", "Gemma3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(MixedLayersConfig):
    """Sizes and switches of a Gemma 3 text model, named as in Hugging Face's `Gemma3TextConfig`.

    `rope_theta` and `rope_scaling` are those of the layers that see all tokens.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation,
        a rotary scaling or a kind of layer that is not implemented.

    Example:
      >>> Gemma3Config(num_hidden_layers=4, sliding_window_pattern=2).layer_types
      ('sliding_attention', 'full_attention', 'sliding_attention', 'full_attention')
    """

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"  # hidden_act follows it, whatever the file says
    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    rope_local_base_freq: float = 10000.0  # rope_theta of the layers with a window
    rope_local_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 6  # every so manieth layer sees all tokens
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        object.__setattr__(self, "hidden_act", self.hidden_activation)
        if self.rope_local_scaling is not None:
            settings = frozen_settings(self.rope_local_scaling)
            object.__setattr__(self, "rope_local_scaling", settings)
        self.check_sizes(("sliding_window_pattern",))
        super().__post_init__()
        cap = ("final_logit_softcapping",) * (self.final_logit_softcapping is not None)
        self.check_positive(("query_pre_attn_scalar", "rope_local_base_freq", *cap))

    def usual_layer_types(self) -> tuple[str, ...]:
        """Every `sliding_window_pattern`-th layer sees all tokens."""
        numbers = range(1, self.num_hidden_layers + 1)
        return tuple(SLIDING if i % self.sliding_window_pattern else FULL for i in numbers)

    @property
    def sliding_kind(self) -> LayerKind:
        """The layers that see a window."""
        local = {"rope_theta": self.rope_local_base_freq, "rope_scaling": self.rope_local_scaling}
        return LayerKind(self.window, dataclasses.replace(self, **local))


class Gemma3Layer(Gemma2Layer):
    """Gemma 2's layer with normed queries and keys instead of capped scores."""

    norm_names = Gemma2Layer.norm_names | QK_NORM_NAMES

    def attention(self) -> Attention:
        """Attention whose queries and keys are normed."""
        c = self.config
        return Attention(
            c,
            self.param_dtype,
            bias=c.attention_bias,
            out_bias=c.attention_bias,
            qk_norm=gemma_norm(c, self.param_dtype),
            scale=c.query_pre_attn_scalar**-0.5,
        )


class Gemma3(CappedDecoder):
    """Gemma 3 text decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = Gemma3Config(vocab_size=16, hidden_size=8, intermediate_size=16, head_dim=4,
      ...                       num_hidden_layers=2, num_attention_heads=2,
      ...                       num_key_value_heads=1, sliding_window=2)
      >>> model, ids = Gemma3(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["k_norm"]["scale"].shape
      (2, 4)
    """

    config: Gemma3Config

    def layer_class(self) -> type[DecoderLayer]:
        """Gemma 3's layer."""
        return Gemma3Layer


def _fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` says in other words: nulls, the pattern, the two rotary settings."""
    found = nullable("sliding_window", "final_logit_softcapping")(raw)
    pattern = raw.get("_sliding_window_pattern") or raw.get("sliding_window_pattern")
    if pattern is not None:
        found["sliding_window_pattern"] = pattern
    return found | _rotary_fields(raw)


def _rotary_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 has a rotary setting for each kind of layer; its elders have three fields."""
    both = raw.get("rope_parameters")
    if not both:
        return {}
    if not isinstance(both, dict) or set(both) - {FULL, SLIDING}:
        expected = f"settings for {FULL} and for {SLIDING}"
        fix = "give each kind of layer its own, as transformers writes them."
        raise ConfigError(
            format_error("rope_parameters", got=repr(both), expected=expected, fix=fix)
        )
    full, local = dict(both.get(FULL) or {}), dict(both.get(SLIDING) or {})
    thetas = {
        "rope_theta": full.pop("rope_theta", None) or raw.get("rope_theta"),
        "rope_local_base_freq": local.pop("rope_theta", None) or raw.get("rope_local_base_freq"),
    }
    scalings = {
        name: None if rope.get("rope_type", "default") == "default" else rope
        for name, rope in (("rope_scaling", full), ("rope_local_scaling", local))
    }
    return {name: theta for name, theta in thetas.items() if theta is not None} | scalings


def _to_json(config: Gemma3Config) -> dict[str, Any]:
    fields = decoder_json(config)
    local: dict[str, Any] = dict(fields.pop("rope_local_scaling") or {"rope_type": "default"})
    local["rope_theta"] = config.rope_local_base_freq
    fields["rope_parameters"] = {FULL: fields["rope_parameters"], SLIDING: local}
    return fields


FAMILY = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    config=Gemma3Config,
    module=Gemma3,
    to_json=_to_json,
    fields=_fields,
    neutral={"use_bidirectional_attention": (None, False)},
    harmless=("cache_implementation", "_sliding_window_pattern"),
    redundant=ROTARY_TABLES,
)
