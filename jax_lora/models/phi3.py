"""Phi-3 and Phi-4-mini: one kernel for queries, keys and values, one for gate and up; longrope.

Reference:
    Abdin et al. (arXiv:2404.14219), section 2; Ding et al., LongRoPE (arXiv:2402.13753).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import PreNormLayer
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json
from jax_lora.models.layout import Layout
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.model_config import is_positive
from jax_lora.models.norms import RMSNorm
from jax_lora.models.windows import WindowConfig

__all__ = ["Phi3", "Phi3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(WindowConfig):
    """Sizes and switches of a Phi-3, named as in Hugging Face's `Phi3Config`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a rotary scaling that is not implemented.

    Example:
      >>> Phi3Config(hidden_size=64, num_attention_heads=2, partial_rotary_factor=0.75).rotary_dim
      24
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096  # longrope's trained length
    partial_rotary_factor: float = 1.0  # of each head's channels, how many are rotated
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        if self.rope_scaling is not None:
            self._settle_scaling(dict(self.rope_scaling))
        self.check_sizes(("original_max_position_embeddings",))
        if not is_positive(self.partial_rotary_factor) or self.partial_rotary_factor > 1:
            got, expected = self.partial_rotary_factor, "a number above 0, at most 1"
            self.refuse("partial_rotary_factor", got, expected, "1.0 rotates all channels.")
        self.check_choice("rope_type", ("default", "longrope"))
        super().__post_init__()

    def _settle_scaling(self, scaling: dict[str, Any]) -> None:
        """Longrope has had other names in Phi-3's files, and some of its settings fields apart."""
        kind, _ = self.rope_type, scaling.pop("type", None)
        scaling["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
        scaling["original_max_position_embeddings"] = self.original_max_position_embeddings
        part = scaling.pop("partial_rotary_factor", self.partial_rotary_factor)
        object.__setattr__(self, "partial_rotary_factor", part)
        object.__setattr__(self, "rope_scaling", scaling)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's channels are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


class Phi3Layer(PreNormLayer):
    """Attention, then the gated feed-forward part, each on a normed copy of x."""

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.attn = Attention(c, dtype, fused=True)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.mlp = GatedMLP(c, dtype, fused=True)


class Phi3(Decoder):
    """Phi-3 decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    With longrope, one call rotates all its tokens by the short or by the long factors, as its
    longest position asks. Keys in a cache keep the rotation they were written with, so let one
    cache stay on one side of the trained length.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = Phi3Config(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                     num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Phi3(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["qkv_proj"]["kernel"].shape
      (2, 8, 24)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Phi-3's layer."""
        return Phi3Layer

    def layout(self) -> Layout:
        """Where a Phi-3's parameters stand in its files."""
        return self.usual_layout(
            attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj")
        )


def _fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of the channels that is rotated may stand among the rotary settings."""
    found = {}
    if raw.get("original_max_position_embeddings") is not None:
        found["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return found


def _to_json(config: Phi3Config) -> dict[str, Any]:
    fields = decoder_json(config)
    fields["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return fields


FAMILY = Family(
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    config=Phi3Config,
    module=Phi3,
    to_json=_to_json,
    fields=_fields,
    neutral={
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "lm_head_bias": (None, False),
        "full_attn_mod": (None, 1),
        "interpolate_factor": (None, 1),
    },
    harmless=("embd_pdrop", "resid_pdrop"),
    redundant=ROTARY_TABLES,
)
