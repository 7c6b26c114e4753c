"""The configuration that all rotary decoders share, in Hugging Face's terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax.core import FrozenDict

from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.model_config import ModelConfig, is_positive, is_size

__all__ = ["DecoderConfig", "LayerKind", "frozen_settings"]

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# What each rotary scaling cannot do without; the keys are all the scalings there are.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "longrope": ("original_max_position_embeddings",),
}
# Settings with a number for each pair of rotated channels.
_ROPE_LISTS = {"longrope": ("short_factor", "long_factor")}


class LayerKind(NamedTuple):
    """What layers of one kind have in common; most models have one kind only.

    Attributes:
      window: How many tokens back a query sees, itself included; None: all.
      rope: The configuration whose rotary fields these layers go by.
    """

    window: int | None
    rope: DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Sizes and switches of a decoder with rotary positions and grouped-query attention.

    Each architecture adds its own fields. `jax_lora.models.load` fills one from `config.json`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a rotary scaling that is not implemented.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as query heads, that is, no grouping
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # {"rope_type": "linear", "factor": 2.0, ...}
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim and is_size(self.num_attention_heads):
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.rope_scaling is not None:  # frozen, so that a module that holds it can be hashed
            object.__setattr__(self, "rope_scaling", frozen_settings(self.rope_scaling))
        self.check_sizes(_SIZES)
        self.check_positive(("rms_norm_eps", "rope_theta"))
        self.check_choice("hidden_act", ACTIVATIONS)
        self._check_heads()
        self._check_rope()

    @property
    def rope_type(self) -> str:
        """Name of the rotary scaling: default, linear, dynamic, yarn, llama3 or longrope."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type") or scaling.get("type") or "default"

    @property
    def rotary_dim(self) -> int:
        """How many of a head's channels are rotated."""
        return self.head_dim

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        return (LayerKind(None, self),) * self.num_hidden_layers

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            self.refuse(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"a divisor of num_attention_heads, {self.num_attention_heads}",
                "let each key-value head serve equally many query heads.",
            )
        if self.rotary_dim % 2:
            where = "head_dim" if self.rotary_dim == self.head_dim else "rotated part of head_dim"
            fix = "rotary embedding turns channel pairs."
            self.refuse(where, self.rotary_dim, "an even number", fix)

    def _check_rope(self) -> None:
        scaling, kind = self.rope_scaling or {}, self.rope_type
        if kind not in _ROPE_NEEDS:
            self.refuse(
                "rope_scaling: rope_type",
                kind,
                "one of " + ", ".join(_ROPE_NEEDS),
                "this scaling is not implemented; use a checkpoint with another.",
            )
        for name in _ROPE_NEEDS[kind]:
            if not is_positive(scaling.get(name)):
                self.refuse(
                    f"rope_scaling: {name}",
                    scaling.get(name),
                    f"a number above 0 (scaling {kind!r} needs it)",
                    f"give rope_scaling a {name}.",
                )
        for name in _ROPE_LISTS.get(kind, ()):
            factors: Any = scaling.get(name)
            pairs = self.rotary_dim // 2
            fits = isinstance(factors, tuple) and len(factors) == pairs
            if not fits or not all(map(is_positive, factors)):
                expected = f"{pairs} numbers above 0, one for each pair of channels"
                fix = f"give rope_scaling a {name}."
                self.refuse(f"rope_scaling: {name}", factors, expected, fix)
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            self.refuse(
                "rope_scaling: partial_rotary_factor",
                scaling["partial_rotary_factor"],
                "1.0: every channel is rotated",
                "partial rotation is not implemented; use a checkpoint without it.",
            )


def frozen_settings(settings: Mapping[str, Any]) -> FrozenDict[str, Any]:
    """Settings that can be hashed: lists become tuples."""
    return FrozenDict({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
