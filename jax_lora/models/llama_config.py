"""The Llama family's configuration, in the terms of Hugging Face's `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from jax_lora.errors import ConfigError, explain

__all__ = ["LlamaConfig"]

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
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of a Llama decoder, named as in Hugging Face's `LlamaConfig`.

    Use it to build a fresh `Llama`; `jax_lora.models.load` fills one from a checkpoint's
    `config.json`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a rotary scaling that is not implemented.

    Example:
      >>> LlamaConfig(hidden_size=64, num_attention_heads=4).head_dim
      16
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
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):  # noqa: D105  fills in what is derived, then checks
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim and _is_size(self.num_attention_heads):
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.rope_scaling is not None:  # frozen, so that a module that holds it can be hashed
            object.__setattr__(self, "rope_scaling", FrozenDict(self.rope_scaling))
        _check_sizes(self)
        _check_rope(self)
        if self.hidden_act not in ("silu", "swish"):
            raise ConfigError(
                explain(
                    "hidden_act",
                    got=repr(self.hidden_act),
                    expected="'silu', the only activation of the Llama family",
                    fix="use a checkpoint of a Llama model.",
                )
            )

    @property
    def rope_type(self) -> str:
        """Name of the rotary scaling: default, linear, dynamic, yarn or llama3."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type") or scaling.get("type") or "default"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _check_sizes(config: LlamaConfig) -> None:
    for name in _SIZES:
        if not _is_size(getattr(config, name)):
            _refuse(name, getattr(config, name), "a whole number above 0", f"give {name}.")
    for name in ("rms_norm_eps", "rope_theta"):
        if not _is_positive(getattr(config, name)):
            _refuse(name, getattr(config, name), "a number above 0", f"give {name}.")
    if config.num_attention_heads % config.num_key_value_heads:
        _refuse(
            "num_key_value_heads",
            config.num_key_value_heads,
            f"a divisor of num_attention_heads, {config.num_attention_heads}",
            "let each key-value head serve equally many query heads.",
        )
    if config.head_dim % 2:
        _refuse(
            "head_dim", config.head_dim, "an even number", "rotary embedding turns channel pairs."
        )


def _check_rope(config: LlamaConfig) -> None:
    scaling, kind = config.rope_scaling or {}, config.rope_type
    if kind not in _ROPE_NEEDS:
        _refuse(
            "rope_scaling: rope_type",
            kind,
            "one of " + ", ".join(_ROPE_NEEDS),
            "this scaling is not implemented; use a checkpoint with another.",
        )
    for name in _ROPE_NEEDS[kind]:
        if not _is_positive(scaling.get(name)):
            _refuse(
                f"rope_scaling: {name}",
                scaling.get(name),
                f"a number above 0 (scaling {kind!r} needs it)",
                f"give rope_scaling a {name}.",
            )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(
            "rope_scaling: partial_rotary_factor",
            scaling["partial_rotary_factor"],
            "1.0: every channel is rotated",
            "partial rotation is not implemented; use a checkpoint without it.",
        )


def _refuse(where: str, got: Any, expected: str, fix: str) -> None:
    raise ConfigError(explain(f"LlamaConfig: {where}", got=repr(got), expected=expected, fix=fix))
