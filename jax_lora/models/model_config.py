"""What all architectures' configurations have in common: checks, and the text they came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from jax_lora.errors import ConfigError, format_error

__all__ = ["ModelConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of every architecture's configuration; the fields have Hugging Face's names.

    Args:
      source: The text of the `config.json` that it was read from, so that saving an unchanged
        model writes the same file again. Two configurations may differ in it and be equal.
    """

    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    source: str = dataclasses.field(default="", repr=False, compare=False)

    def check_sizes(self, names: Iterable[str]) -> None:
        """Refuse a size that is no positive integer."""
        for name in names:
            if not is_size(getattr(self, name)):
                self.refuse(name, getattr(self, name), "a whole number above 0", f"give {name}.")

    def check_positive(self, names: Iterable[str]) -> None:
        """Refuse a number that is not finite and above 0."""
        for name in names:
            if not is_positive(getattr(self, name)):
                self.refuse(name, getattr(self, name), "a number above 0", f"give {name}.")

    def check_choice(self, name: str, choices: Iterable[Any]) -> None:
        """Refuse a value that is not implemented."""
        value, choices = getattr(self, name), tuple(choices)
        if value not in choices:
            expected = " or ".join(map(repr, choices))
            self.refuse(name, value, expected, "this variant is not implemented.")

    def refuse(self, where: str, got: Any, expected: str, fix: str) -> NoReturn:
        """Raise the error for one field."""
        where = f"{type(self).__name__}: {where}"
        raise ConfigError(format_error(where, got=repr(got), expected=expected, fix=fix))


def is_size(value: Any) -> bool:
    """Tell whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive(value: Any) -> bool:
    """Tell whether a value is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
