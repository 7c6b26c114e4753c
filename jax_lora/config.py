"""LoraConfig: which kernels get an adapter, with which rank and scale."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora import paths
from jax_lora.errors import ConfigError
from jax_lora.storage.json_files import parse_json

INITIALIZERS = ("gaussian",)


class FrozenMapping(Mapping[str, Any]):
    """An immutable, hashable mapping."""

    def __init__(self, items: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()):
        """Copy the items and keep their order."""
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key."""
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in order."""
        return iter(self._items)

    def __len__(self) -> int:
        """Count the items."""
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        """Compare with any mapping, ignoring order."""
        return isinstance(other, Mapping) and self._items == dict(other)

    def __hash__(self) -> int:
        """Hash the items: a config is part of a treedef, which must be hashable."""
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        """Return the representation of the equal dict."""
        return repr(self._items)


class Patterns(FrozenMapping):
    """An ordered mapping from pattern to value; the first pattern that matches wins."""

    def __eq__(self, other: object) -> bool:
        """Compare items. Two `Patterns` must also agree in order, as the first match wins."""
        if isinstance(other, Patterns):
            return list(self._items.items()) == list(other._items.items())
        return super().__eq__(other)

    __hash__ = FrozenMapping.__hash__


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Configure an adapter: which kernels to adapt, with which rank, scale and initialization.

    A config is immutable and hashable, and is validated when it is constructed.

    Args:
      rank: Rank r of the LoRA factors.
      alpha: Numerator of the scale: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
      targets: Kernels to adapt: `"all-linear"` (dense kernels except the output head and routers),
        `"attention"`, `"mlp"`, a name, or a sequence of names and globs. A name matches whole path
        segments.
      exclude: Names and globs of kernels to leave out; takes precedence over `targets`.
      rank_pattern: Ranks by name or glob; the first pattern that matches a path wins. A pattern
        can name a layer of a layer stack by its index, as in `"layers/3/attn/q_proj"` or
        `"layers/[0-3]/*"`.
      alpha_pattern: Values of alpha by name or glob, matched like `rank_pattern`.
      layers: Indices, from 0, of the layers to adapt in every layer stack; None adapts all.
      modules_to_save: Names and globs of leaves to train in full, such as a new head or biases.
      use_rslora: Scale by alpha / sqrt(rank), which keeps updates of large ranks stable.
      use_dora: Train a magnitude per output (DoRA); the low-rank update then changes only the
        direction.
      dropout: Dropout rate on the input of the LoRA branch; `jl.dropout` enables it in training.
      init: Initialization of `a`: `"gaussian"`, with standard deviation 1 / sqrt(in). `b` is zero.
      dtype: Type of the adapter weights, independent of the base weights.
      allow_unused: Warn instead of raising an error if one of several patterns matches nothing.
      metadata: Named text that another file format stores with the adapter, such as the PEFT
        configuration under `"peft"`. It is ignored in comparisons.

    Raises:
      ConfigError: A value is invalid.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), section 4.1: h = W0 x + (alpha / r) B A x.
      Kalajdzievski, rsLoRA (arXiv:2312.03732), equation 2: alpha / sqrt(r).
      Liu et al., DoRA (arXiv:2402.09353), equation 5: magnitude and direction.

    Example:
      >>> config = LoraConfig(rank=8, alpha=16.0, targets=["q_proj", "v_proj"])
      >>> config.scale(8, 16.0)
      2.0
      >>> LoraConfig.from_json(config.to_json()) == config
      True
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=Patterns)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=Patterns)
    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0
    init: str = "gaussian"
    dtype: np.dtype = np.dtype("float32")
    allow_unused: bool = False
    metadata: Mapping[str, str] = dataclasses.field(
        default_factory=FrozenMapping, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Normalize and validate every value."""
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - frozen
        set_field("rank", _rank("rank", self.rank))
        set_field("alpha", _alpha("alpha", self.alpha))
        set_field("targets", _targets(self.targets))
        set_field("exclude", _names("exclude", self.exclude))
        set_field("modules_to_save", _names("modules_to_save", self.modules_to_save))
        set_field("rank_pattern", _patterns("rank_pattern", self.rank_pattern, _rank))
        set_field("alpha_pattern", _patterns("alpha_pattern", self.alpha_pattern, _alpha))
        set_field("layers", _layers(self.layers))
        set_field("use_rslora", _flag("use_rslora", self.use_rslora))
        set_field("use_dora", _flag("use_dora", self.use_dora))
        set_field("allow_unused", _flag("allow_unused", self.allow_unused))
        set_field("dropout", _dropout(self.dropout))
        set_field("init", _init(self.init))
        set_field("dtype", _dtype(self.dtype))
        set_field("metadata", _metadata(self.metadata))

    def scale(self, rank: int, alpha: float) -> float:
        """Return the scale of the update of one kernel.

        Args:
          rank: The kernel's rank.
          alpha: The kernel's alpha.

        Returns:
          alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        """
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rank_of(self, *names: str) -> int:
        """Return the rank of a kernel: the first `rank_pattern` that matches, else `rank`.

        Args:
          *names: The kernel's path. For a layer of a layer stack, also the path with its index.

        Returns:
          The rank.
        """
        return _first_value(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """Return the alpha of a kernel: the first `alpha_pattern` that matches, else `alpha`.

        Args:
          *names: The kernel's path. For a layer of a layer stack, also the path with its index.

        Returns:
          The alpha.
        """
        return _first_value(self.alpha_pattern, names, self.alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict of JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["dtype"] = self.dtype.name
        # Lists of pairs: the first match wins, and JSON objects do not guarantee an order.
        values["rank_pattern"] = [list(item) for item in self.rank_pattern.items()]
        values["alpha_pattern"] = [list(item) for item in self.alpha_pattern.items()]
        for name in ("targets", "exclude", "modules_to_save", "layers"):
            values[name] = list(values[name]) if isinstance(values[name], tuple) else values[name]
        values["metadata"] = dict(self.metadata)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Build a config from the result of `to_dict`.

        Args:
          values: Settings by name; missing settings have their defaults.

        Returns:
          The config.

        Raises:
          ConfigError: A name is unknown or a value is invalid.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"LoraConfig: {name!r}",
                    got="an unknown setting",
                    expected=f"one of {', '.join(known)}",
                    fix=f"Did you mean {paths.nearest(name, known, 1)[0]!r}?",
                )
        return cls(**values)

    def to_json(self) -> str:
        """Return the settings as JSON with sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LoraConfig:
        """Build a config from the result of `to_json`.

        Raises:
          ConfigError: The text is not a JSON object of known settings.
        """
        try:
            values = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "LoraConfig.from_json",
                got=f"text that is not JSON ({error})",
                expected="the output of LoraConfig.to_json",
                fix="Check that the file is complete.",
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                "LoraConfig.from_json",
                got=f"a JSON {type(values).__name__}",
                expected="a JSON object of settings",
                fix="Write one with LoraConfig.to_json.",
            )
        return cls.from_dict(values)


def _first_value(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    for pattern, value in patterns.items():
        if any(paths.matches(pattern, name) for name in names):
            return value
    return default


def _refuse(where: str, value: Any, expected: str, fix: str) -> ConfigError:
    return ConfigError(f"LoraConfig: {where}", got=repr(value), expected=expected, fix=fix)


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # larger ones may fit no float
    return isinstance(value, (float, np.integer, np.floating))


def _rank(where: str, value: Any) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not whole or not 1 <= value < 2**31:  # larger ones may fit no float
        fix = "Typical ranks are 8 to 64."
        raise _refuse(where, value, "an integer of at least 1, and less than 2**31", fix)
    return int(value)


def _alpha(where: str, value: Any) -> float:
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        fix = "Typical values are once or twice the rank."
        raise _refuse(where, value, "a finite number above 0", fix)
    return float(value)


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _refuse(where, value, "True or False", "Pass a bool.")
    return bool(value)


def _dropout(value: Any) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        raise _refuse("dropout", value, "a number of at least 0 and below 1", "Try 0.05.")
    return float(value)


def _init(value: Any) -> str:
    if value not in INITIALIZERS:
        raise _refuse("init", value, f"one of {', '.join(INITIALIZERS)}", "Omit it.")
    return value


def _dtype(value: Any) -> np.dtype:
    try:
        dtype = None if value is None else jnp.dtype(value)
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise _refuse("dtype", value, "a floating-point type", 'Use "float32" or "bfloat16".')
    return dtype


def _metadata(value: Any) -> FrozenMapping:
    if not isinstance(value, Mapping):
        raise _refuse("metadata", value, "a mapping from name to text", 'Use {"note": "text"}.')
    for name, text in value.items():
        if not isinstance(name, str) or not name:
            raise _refuse("metadata", name, "names that are non-empty strings", "Rename it.")
        if not isinstance(text, str):
            raise _refuse(f"metadata[{name!r}]", text, "a string", "Pass json.dumps(value).")
    return FrozenMapping(value)


def _names(where: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    is_sequence = isinstance(names, (list, tuple, set, frozenset))
    if not is_sequence or not all(isinstance(name, str) and name.strip("/") for name in names):
        raise _refuse(where, value, "names or globs", 'Use ["q_proj", "layers/*/kernel"].')
    # The order of a set differs between processes, so sets are sorted.
    return tuple(sorted(names)) if isinstance(names, (set, frozenset)) else tuple(names)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    is_index = lambda each: isinstance(each, (int, np.integer)) and not isinstance(each, bool)  # noqa: E731
    is_sequence = isinstance(value, (list, tuple, set, frozenset, range)) and len(value) > 0
    if not is_sequence or not all(is_index(each) and each >= 0 for each in value):
        raise _refuse("layers", value, "a list of indices from 0", "Use [0, 1], or None for all.")
    return tuple(sorted({int(each) for each in value}))


def _targets(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value.strip("/"):
        return value
    names = _names("targets", value)
    if not names:
        raise _refuse("targets", value, "at least one name", 'Use "all-linear" for every kernel.')
    return names


def _patterns(where: str, value: Any, check: Any) -> Patterns:
    items = value
    if isinstance(value, (list, tuple)) and all(
        isinstance(item, (list, tuple)) and len(item) == 2 for item in value
    ):
        items = dict(value)
    if not isinstance(items, Mapping) or not all(isinstance(key, str) and key for key in items):
        raise _refuse(where, value, "a mapping from pattern to value", 'Use {"q_proj": 16}.')
    return Patterns({key: check(f"{where}[{key!r}]", each) for key, each in items.items()})
