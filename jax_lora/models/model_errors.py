"""The two errors that this folder raises, each with where, got, expected and fix."""

from __future__ import annotations

from typing import Any, NoReturn

from jax_lora.errors import ConfigError, ModelError, format_error


def raise_config_error(where: str, got: Any, expected: str, fix: str) -> NoReturn:
    """Raise a `ConfigError` for an argument or a setting; see `format_error` for the four parts."""
    raise ConfigError(format_error(where, got=str(got), expected=expected, fix=fix))


def raise_model_error(where: Any, got: Any, expected: str, fix: str) -> NoReturn:
    """Raise a `ModelError` for a file or a model; see `format_error` for the four parts."""
    raise ModelError(format_error(str(where), got=str(got), expected=expected, fix=fix))
