"""Layers that see a window of the last tokens only, and models that have some such layers."""

from __future__ import annotations

import dataclasses

from jax_lora.models.decoder_config import DecoderConfig, LayerKind
from jax_lora.models.model_config import is_size

__all__ = ["FULL", "SLIDING", "MixedLayersConfig", "WindowConfig"]

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig(DecoderConfig):
    """Configuration of a decoder whose layers all see the same window, or all tokens."""

    sliding_window: int | None = None

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        super().__post_init__()
        if self.sliding_window is not None and not is_size(self.sliding_window):
            expected = "a whole number above 0, or None"
            self.refuse("sliding_window", self.sliding_window, expected, "give a window or none.")

    @property
    def window(self) -> int | None:
        """How many tokens back the layers with a window see, each token itself included."""
        return self.sliding_window

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        return (LayerKind(self.window, self),) * self.num_hidden_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedLayersConfig(WindowConfig):
    """Configuration of a decoder in which every layer either sees a window or all tokens."""

    layer_types: tuple[str, ...] | None = None  # None: the architecture's usual pattern

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        super().__post_init__()
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", self.usual_layer_types())
        self._check_layer_types(self.layer_types or ())

    def usual_layer_types(self) -> tuple[str, ...]:
        """What the layers are where `layer_types` does not say."""
        raise NotImplementedError

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        kinds = {FULL: self.full_kind, SLIDING: self.sliding_kind}
        return tuple(kinds[each] for each in self.layer_types or ())

    @property
    def full_kind(self) -> LayerKind:
        """The layers that see all tokens."""
        return LayerKind(None, self)

    @property
    def sliding_kind(self) -> LayerKind:
        """The layers that see a window."""
        return LayerKind(self.window, self)

    def _check_layer_types(self, types: tuple[str, ...]) -> None:
        if set(types) - {FULL, SLIDING} or len(types) != self.num_hidden_layers:
            expected = f"{FULL} or {SLIDING} for each of {self.num_hidden_layers} layers"
            self.refuse("layer_types", types, expected, "other layers are not implemented.")
        if SLIDING in types and self.window is None:
            fix = "give the window of the layers that have one."
            self.refuse("sliding_window", None, f"a whole number, for {SLIDING} layers", fix)
