"""LoraConfig: which kernels get an adapter, and of what rank and scale."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora import paths
from jax_lora.errors import ConfigError, format_error

INITIALISERS = ("gaussian",)


class FrozenMapping(Mapping[str, Any]):
    """A mapping that cannot be changed, and that can be hashed."""

    def __init__(self, items: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()):
        """Copy the items, in the order given."""
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        """Return the value of exactly this key."""
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in order."""
        return iter(self._items)

    def __len__(self) -> int:
        """Count the items."""
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        """Compare items, in any order, with those of any mapping."""
        return isinstance(other, Mapping) and self._items == dict(other)

    def __hash__(self) -> int:
        """Hash the items, so that a config can be part of a treedef."""
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        """Show as the dict it was made from."""
        return repr(self._items)


class Patterns(FrozenMapping):
    """Values by pattern, in order; the first pattern that matches wins."""

    def __eq__(self, other: object) -> bool:
        """Compare items; between two `Patterns` order counts, since the first match wins."""
        if isinstance(other, Patterns):
            return list(self._items.items()) == list(other._items.items())
        return super().__eq__(other)

    __hash__ = FrozenMapping.__hash__

    def first_match(self, path: str) -> str | None:
        """Return the first pattern that matches the path, or None."""
        return next((pattern for pattern in self._items if paths.matches(pattern, path)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt and how; frozen, hashable, checked when constructed.

    Args:
      rank: Rank r of every pair (a, b) that no `rank_pattern` changes.
      alpha: Numerator of the scale: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
      targets: `"all-linear"` (every dense kernel but the output head), `"attention"`, `"mlp"`, a
        name, or a sequence of names and globs. A name matches whole path segments.
      exclude: Names and globs that win over `targets`.
      rank_pattern: Ranks by name or glob; the first pattern that matches a path wins. A pattern
        may name one layer of a stack by its index, as in `"layers/3/attn/q_proj"` or
        `"layers/[0-3]/*"`.
      alpha_pattern: Alphas by name or glob, in the same way.
      layers: The only layers of every stack that get an adapter, counted from 0; None for all.
      modules_to_save: Names and globs of leaves trained whole beside the pairs (a head, biases).
      use_rslora: Scale by alpha / sqrt(rank), which keeps large ranks learning.
      use_dora: Train the norm of every output's weights beside the pair, which then changes
        directions alone.
      dropout: Share of the adapter's inputs set to zero in training; `jl.dropout` switches it on.
      init: How `a` starts; `"gaussian"` has deviation 1 / sqrt(in). `b` starts at zero.
      dtype: Type of a and b, whatever the base's.
      allow_unused: Warn instead of raising when one pattern of several matches nothing.
      metadata: Text by name that another file format keeps with the adapter, such as the
        configuration that `jl.peft.load` read under `"peft"`. Nothing else interprets it, and two
        configurations that differ only in it are equal.

    Raises:
      ConfigError: A value that cannot mean anything.

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
        """Normalise what has several spellings, then check every value."""
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
        """Return the factor in front of a @ b for one kernel.

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
          *names: The kernel's path; for one layer of a stack, the path with its index as well.

        Returns:
          The rank.
        """
        return _first_value(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """Return the alpha of a kernel: the first `alpha_pattern` that matches, else `alpha`.

        Args:
          *names: The kernel's path; for one layer of a stack, the path with its index as well.

        Returns:
          The alpha.
        """
        return _first_value(self.alpha_pattern, names, self.alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["dtype"] = self.dtype.name
        # A list of pairs, as JSON objects have no order and the first match wins.
        values["rank_pattern"] = [list(item) for item in self.rank_pattern.items()]
        values["alpha_pattern"] = [list(item) for item in self.alpha_pattern.items()]
        for name in ("targets", "exclude", "modules_to_save", "layers"):
            values[name] = list(values[name]) if isinstance(values[name], tuple) else values[name]
        values["metadata"] = dict(self.metadata)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Build a config from `to_dict`'s values.

        Args:
          values: Settings by name; what is left out takes its default.

        Returns:
          The config.

        Raises:
          ConfigError: An unknown name, or a value that cannot mean anything.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    format_error(
                        f"LoraConfig: {name!r}",
                        got="a setting that does not exist",
                        expected=f"one of {', '.join(known)}",
                        fix=f"Did you mean {paths.nearest(name, known, 1)[0]!r}?",
                    )
                )
        return cls(**values)

    def to_json(self) -> str:
        """Return the settings as a JSON text with sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LoraConfig:
        """Build a config from `to_json`'s text.

        Raises:
          ConfigError: The text is not a JSON object of known settings.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                format_error(
                    "LoraConfig.from_json",
                    got=f"text that is not JSON ({error})",
                    expected="what LoraConfig.to_json wrote",
                    fix="Check that the file is whole.",
                )
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                format_error(
                    "LoraConfig.from_json",
                    got=f"a JSON {type(values).__name__}",
                    expected="a JSON object of settings",
                    fix="Write one with LoraConfig.to_json.",
                )
            )
        return cls.from_dict(values)


def _first_value(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    for pattern, value in patterns.items():
        if any(paths.matches(pattern, name) for name in names):
            return value
    return default


def _refuse(where: str, value: Any, expected: str, fix: str) -> ConfigError:
    return ConfigError(
        format_error(f"LoraConfig: {where}", got=repr(value), expected=expected, fix=fix)
    )


def _is_number(value: Any) -> bool:
    numeric = isinstance(value, (int, float, np.integer, np.floating))
    return numeric and not isinstance(value, bool)


def _rank(where: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < 1:
        raise _refuse(where, value, "an integer of at least 1", "8 to 64 is usual.")
    return int(value)


def _alpha(where: str, value: Any) -> float:
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise _refuse(where, value, "a finite number above 0", "Once or twice the rank is usual.")
    return float(value)


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _refuse(where, value, "True or False", "Pass a bool.")
    return bool(value)


def _dropout(value: Any) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        raise _refuse("dropout", value, "a number of at least 0 and below 1", "0.05 is usual.")
    return float(value)


def _init(value: Any) -> str:
    if value not in INITIALISERS:
        raise _refuse("init", value, f"one of {', '.join(INITIALISERS)}", "Leave it out.")
    return value


def _dtype(value: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise _refuse("dtype", value, "a floating-point type", 'Use "float32" or "bfloat16".')
    return dtype


def _metadata(value: Any) -> FrozenMapping:
    if not isinstance(value, Mapping):
        raise _refuse("metadata", value, "a mapping from name to text", 'Such as {"note": "text"}.')
    for name, text in value.items():
        if not isinstance(name, str) or not name:
            raise _refuse("metadata", name, "names that are strings, not empty", "Rename it.")
        if not isinstance(text, str):
            raise _refuse(f"metadata[{name!r}]", text, "a string", "Pass json.dumps(value).")
    return FrozenMapping(value)


def _names(where: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    is_sequence = isinstance(names, (list, tuple, set, frozenset))
    if not is_sequence or not all(isinstance(name, str) and name.strip("/") for name in names):
        raise _refuse(where, value, "names or globs", 'Such as ["q_proj", "layers/*/kernel"].')
    # A set has no order of its own that lasts from one process to the next.
    return tuple(sorted(names)) if isinstance(names, (set, frozenset)) else tuple(names)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    is_index = lambda each: isinstance(each, (int, np.integer)) and not isinstance(each, bool)  # noqa: E731
    is_sequence = isinstance(value, (list, tuple, set, frozenset, range)) and len(value) > 0
    if not is_sequence or not all(is_index(each) and each >= 0 for each in value):
        raise _refuse("layers", value, "indices from 0 on", "Such as [0, 1], or None for all.")
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
        raise _refuse(where, value, "a mapping from pattern to value", 'Such as {"q_proj": 16}.')
    return Patterns({key: check(f"{where}[{key!r}]", each) for key, each in items.items()})
