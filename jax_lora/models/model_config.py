"""The base of all model configurations: checks of fields, and the text that was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NoReturn

from jax_lora.errors import ConfigError
from jax_lora.storage.schema import is_integer, is_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of every architecture's configuration; the fields have Hugging Face's names.

    `jax_lora.models.load` fills one from `config.json`. A field that is out of range or asks for
    a variant that is not implemented raises a `ConfigError` that names the class and the field.

    `source` is the text of the `config.json` that it was read from, so that saving an unchanged
    model writes the same file again. Two configurations that differ only in it are equal.
    """

    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    source: str = dataclasses.field(default="", repr=False, compare=False)

    def set_field(self, name: str, value: Any) -> None:
        """Set a field of the frozen configuration; for `__post_init__` only."""
        object.__setattr__(self, name, value)

    def set_default(self, name: str, default: Any, *, unset: tuple[Any, ...] = (None,)) -> None:
        """Set a field that the user has not set, whose default depends on other fields."""
        if getattr(self, name) in unset:
            self.set_field(name, default)

    def check_sizes(self, names: Iterable[str]) -> None:
        """Raise unless the fields are positive integers."""
        for name in names:
            if not is_positive_int(getattr(self, name)):
                self.fail(name, "a positive integer", f"set {name} to a positive integer.")

    def check_positive(self, names: Iterable[str]) -> None:
        """Raise unless the fields are positive and finite."""
        for name in names:
            if not is_positive(getattr(self, name)):
                self.fail(name, "a positive number", f"set {name} to a positive number.")

    def check_choice(self, name: str, choices: Iterable[Any]) -> None:
        """Raise unless the field has one of the implemented values."""
        if getattr(self, name) not in (choices := tuple(choices)):
            expected = " or ".join(map(repr, choices))
            self.fail(name, expected, "this variant is not implemented.")

    def check_divides(
        self, name: str, multiple: str, fix: str = "give each head equally many channels."
    ) -> None:
        """Raise unless field `name` divides field `multiple`."""
        if (value := getattr(self, multiple)) % getattr(self, name):
            self.fail(name, f"a divisor of {multiple}, {value}", fix)

    def fail(self, name: str, expected: str, fix: str) -> NoReturn:
        """Raise a `ConfigError` for the value of a field."""
        self.fail_at(name, getattr(self, name), expected, fix)

    def fail_at(self, where: str, got: Any, expected: str, fix: str) -> NoReturn:
        """Raise a `ConfigError` for a value inside a field, or derived from one."""
        raise ConfigError(
            f"{type(self).__name__}: {where}", got=repr(got), expected=expected, fix=fix
        )


def is_positive_int(value: Any) -> bool:
    """Tell whether a value is a positive integer."""
    return is_integer(value) and value > 0


def is_positive(value: Any) -> bool:
    """Tell whether a value is a positive and finite number."""
    return is_number(value) and value > 0
