"""The base of all model configurations: checks of fields, and the text that was read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from jax_lora.models.model_errors import raise_config_error

__all__ = ["ModelConfig", "is_positive", "is_size"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of every architecture's configuration; the fields have Hugging Face's names.

    `jax_lora.models.load` fills one from `config.json`. A field that is out of range or asks for
    a variant that is not implemented raises a `ConfigError` that names the class and the field.

    Args:
      source: The text of the `config.json` that it was read from, so that saving an unchanged
        model writes the same file again. Not compared: two configurations that differ only in
        `source` are equal.
    """

    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    source: str = dataclasses.field(default="", repr=False, compare=False)

    def derive(self, name: str, value: Any, *, absent: Any = None) -> None:
        """Set a field of the frozen configuration, if its value is `absent`."""
        if getattr(self, name) == absent:
            self.overwrite(name, value)

    def overwrite(self, name: str, value: Any) -> None:
        """Set a field of the frozen configuration; for `__post_init__` only."""
        object.__setattr__(self, name, value)

    def check_sizes(self, names: Iterable[str]) -> None:
        """Raise unless the fields are positive integers."""
        for name in names:
            if not is_size(getattr(self, name)):
                self.refuse(name, getattr(self, name), "a whole number above 0", f"give {name}.")

    def check_positive(self, names: Iterable[str]) -> None:
        """Raise unless the fields are finite and above 0."""
        for name in names:
            if not is_positive(getattr(self, name)):
                self.refuse(name, getattr(self, name), "a number above 0", f"give {name}.")

    def check_choice(self, name: str, choices: Iterable[Any]) -> None:
        """Raise unless the field has one of the implemented values."""
        value, choices = getattr(self, name), tuple(choices)
        if value not in choices:
            expected = " or ".join(map(repr, choices))
            self.refuse(name, value, expected, "this variant is not implemented.")

    def check_divides(
        self, name: str, total: str, fix: str = "give each head equally many channels."
    ) -> None:
        """Raise unless field `name` divides field `total`."""
        value, of = getattr(self, name), getattr(self, total)
        if of % value:
            self.refuse(name, value, f"a divisor of {total}, {of}", fix)

    def refuse(self, where: str, got: Any, expected: str, fix: str) -> NoReturn:
        """Raise the error for one field."""
        raise_config_error(f"{type(self).__name__}: {where}", repr(got), expected, fix)


def is_size(value: Any) -> bool:
    """Tell whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive(value: Any) -> bool:
    """Tell whether a value is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
