"""Configurations of Llama-like decoders, without and with sliding-window attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax.core import FrozenDict

from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.model_config import ModelConfig, is_positive, is_positive_int

FULL, SLIDING = "full_attention", "sliding_attention"  # the values in `layer_types`

_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings".split()
)
_LARGEST_HEAD = 2**16  # NumPy computes the rotary frequencies during tracing, which must stay fast
# The implemented rotary scalings and the settings that each requires.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
# Optional settings, which must be positive.
_ROPE_OPTIONAL = (
    "factor original_max_position_embeddings attention_factor beta_fast beta_slow".split()
)
# Required lists, with one number for each pair of rotated channels.
_ROPE_LISTS = {"longrope": ("short_factor", "long_factor")}


class LayerKind(NamedTuple):
    """The settings that differ between layers; in most models all layers are of one kind."""

    window: int | None  # most recent tokens that a query attends to, with its own; None: all
    rope: DecoderConfig | None  # with the rotary fields of these layers; None: no rotary embedding


class ExpertSizes(NamedTuple):
    """Sizes of a mixture of experts."""

    total: int  # number of experts
    per_token: int  # number of experts that each token is routed to
    width: int  # intermediate channels of one expert
    normalized: bool  # whether the weights of a token's experts are divided by their sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Configuration of a decoder with rotary positions and grouped-query attention.

    The class of each architecture adds fields and changes defaults; see `architectures.py`.

    Raises:
      ConfigError: If a size is not a positive integer, the number of query heads is not a multiple
        of the number of key-value heads, or an activation or a rotary scaling is not implemented.

    Example:
      >>> DecoderConfig(hidden_size=64, num_attention_heads=4).head_dim
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

    # Class variables, so that `config.json` cannot set them. An architecture with one of these
    # settings declares it as a field.
    attention_bias = False
    attention_out_bias = None  # None: the value of attention_bias
    mlp_bias = False
    query_pre_attn_scalar = None
    attn_logit_softcapping = None
    final_logit_softcapping = None
    embedding_multiplier = 1.0
    attention_multiplier = None  # None: 1 / sqrt(head_dim)
    residual_multiplier = 1.0
    logits_scaling = 1.0

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        self.set_default("num_key_value_heads", self.num_attention_heads, unset=(0, None))
        if not self.head_dim and is_positive_int(self.num_attention_heads):
            self.set_field("head_dim", self.hidden_size // self.num_attention_heads)
        if self.rope_scaling is not None:
            self.set_field("rope_scaling", frozen_settings(self.rope_scaling))
        self.check_sizes(_SIZES)
        self.check_positive(("rms_norm_eps", "rope_theta"))
        self.check_choice("hidden_act", ACTIVATIONS)
        fix = "make num_attention_heads a multiple of num_key_value_heads."
        self.check_divides("num_key_value_heads", "num_attention_heads", fix)
        if self.head_dim > _LARGEST_HEAD:
            self.fail_at(
                "head_dim", self.head_dim, f"at most {_LARGEST_HEAD}", "set a smaller head_dim."
            )
        if self.rotary_dim % 2:
            where = "head_dim" if self.rotary_dim == self.head_dim else "rotated part of head_dim"
            fix = "set an even number: rotary embeddings rotate pairs of channels."
            self.fail_at(where, self.rotary_dim, "an even number", fix)
        self._check_rope()

    @property
    def rope_type(self) -> str:
        """Name of the rotary scaling: default, linear, dynamic, yarn, llama3 or longrope."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type") or scaling.get("type") or "default"

    @property
    def rotary_dim(self) -> int:
        """Number of channels of a head that are rotated."""
        return self.head_dim

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        given = self.attention_out_bias
        return self.attention_bias if given is None else given

    @property
    def llama_4_scaling_beta(self) -> float | None:
        """Coefficient of the factor in `rotary.query_scale`; None: no such factor."""
        return None

    @property
    def attention_scale(self) -> float | None:
        """Factor on the attention scores; None: 1 / sqrt(head_dim)."""
        scalar = self.query_pre_attn_scalar
        return self.attention_multiplier if scalar is None else scalar**-0.5

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        return (LayerKind(None, self),) * self.num_hidden_layers

    @property
    def experts(self) -> ExpertSizes | None:
        """Sizes of the mixture of experts; None: a layer has one feed-forward block."""
        return None

    def _check_rope(self) -> None:
        scaling, kind = self.rope_scaling or {}, self.rope_type
        if kind not in _ROPE_NEEDS:
            expected = "one of " + ", ".join(_ROPE_NEEDS)
            fix = "this scaling is not implemented; use a checkpoint with one that is."
            self.fail_at("rope_scaling: rope_type", kind, expected, fix)

        def check(name: str, valid: bool, expected: str) -> None:
            if not valid:
                fix = f"set {name} in rope_scaling."
                self.fail_at(f"rope_scaling: {name}", scaling.get(name), expected, fix)

        for name in _ROPE_NEEDS[kind]:
            expected = f"a positive number (scaling {kind!r} needs it)"
            check(name, is_positive(scaling.get(name)), expected)
        for name in _ROPE_OPTIONAL:
            value = scaling.get(name)
            check(name, value is None or is_positive(value), "a positive number")
        for name in _ROPE_LISTS.get(kind, ()):
            factors: Any = scaling.get(name)
            pairs = self.rotary_dim // 2
            fits = isinstance(factors, tuple) and len(factors) == pairs
            expected = f"{pairs} positive numbers, one for each pair of channels"
            check(name, fits and all(map(is_positive, factors)), expected)
        if (share := scaling.get("partial_rotary_factor", 1.0)) != 1.0:
            fix = "partial rotation is not implemented; use a checkpoint without it."
            where = "rope_scaling: partial_rotary_factor"
            self.fail_at(where, share, "1.0: every channel is rotated", fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig(DecoderConfig):
    """Configuration of a decoder whose layers all have the same window, or no window."""

    sliding_window: int | None = None

    use_sliding_window = True  # a field in Qwen only, where False disables `sliding_window`

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        super().__post_init__()
        if self.sliding_window is not None and not is_positive_int(self.sliding_window):
            fix = "set the number of tokens in the window, or None for no window."
            self.fail("sliding_window", "a positive integer, or None", fix)

    @property
    def window(self) -> int | None:
        """The window of the layers that have one, as in `LayerKind`."""
        return self.sliding_window if self.use_sliding_window else None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        return (LayerKind(self.window, self),) * self.num_hidden_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedLayersConfig(WindowConfig):
    """Configuration of a decoder in which only some layers have a window."""

    layer_types: tuple[str, ...] | None = None  # None: the architecture's default pattern

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        super().__post_init__()
        self.set_default("layer_types", self.default_layer_types())
        self._check_layer_types(self.layer_types or ())

    def default_layer_types(self) -> tuple[str, ...]:
        """The `layer_types` of a `config.json` that has none."""
        raise NotImplementedError

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        kinds = {FULL: LayerKind(None, self), SLIDING: self.sliding_kind}
        return tuple(kinds[each] for each in self.layer_types or ())

    @property
    def sliding_kind(self) -> LayerKind:
        """The kind of the layers with a window."""
        return LayerKind(self.window, self)

    def _check_layer_types(self, types: tuple[str, ...]) -> None:
        if set(types) - {FULL, SLIDING} or len(types) != self.num_hidden_layers:
            expected = f"{FULL} or {SLIDING} for each of {self.num_hidden_layers} layers"
            self.fail(
                "layer_types", expected, "use a checkpoint with these; others are not implemented."
            )
        if SLIDING in types and self.window is None:
            expected, fix = f"a positive integer, for {SLIDING} layers", "set sliding_window."
            self.fail_at("sliding_window", None, expected, fix)


def frozen_settings(settings: Mapping[str, Any]) -> FrozenDict[str, Any]:
    """Make settings hashable, which Linen requires of module attributes: lists become tuples."""
    return FrozenDict({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
