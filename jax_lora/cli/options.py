"""Where the values of options come from: the command line, then a YAML file, then defaults."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.settings import TrainSettings

DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(TrainSettings)
}

NUMBERS = (
    "alpha",
    "scale",
    "dropout",
    "epochs",
    "learning_rate",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "lora_plus_ratio",
)


def read_config_file(path: str | Path, allowed: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file of options.

    Args:
      path: The file; its keys are the flags' names, with `-` or `_`.
      allowed: The names that there are.

    Returns:
      Values by name.

    Raises:
      ConfigError: The file cannot be read, or has a key that is no option.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            format_error(
                f"-c {path}",
                got=str(error),
                expected="a YAML file of options",
                fix='Write lines such as "learning_rate: 2e-4".',
            )
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            format_error(
                f"-c {path}",
                got=type(values).__name__,
                expected="options by name",
                fix='Write lines such as "rank: 16".',
            )
        )
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    _refuse_unknown(path, named, sorted(allowed))
    # YAML reads 2e-4 as text, as it wants 2.0e-4.
    return {key: _number(value) for key, value in named.items()}


def _refuse_unknown(path: str | Path, named: Mapping[str, Any], allowed: list[str]) -> None:
    for key in named:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(allowed)}."
            raise ConfigError(
                format_error(
                    f"-c {path}", got=f"the key {key!r}", expected="a known option", fix=meant
                )
            )


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Collect the options that were written on the command line.

    Args:
      options: Parsed with `argparse.SUPPRESS` as the default of every one of them.
      names: Their names.

    Returns:
      Values by name.
    """
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def make_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Make settings of chosen values, and defaults for the rest.

    Args:
      values: Values by name.

    Returns:
      The settings.
    """
    values = dict(values)
    targets = values.get("targets")
    if isinstance(targets, str) and "," in targets:
        values["targets"] = targets.split(",")
    for name in ("log", "labels"):
        if isinstance(values.get(name), str):
            values[name] = values[name].split(",")
    if isinstance(values.get("sample_prompt"), str):
        values["sample_prompt"] = [values["sample_prompt"]]
    for name in ("targets", "labels", "log", "sample_prompt"):
        if isinstance(values.get(name), list):
            values[name] = tuple(str(each).strip() for each in values[name])
    for name in NUMBERS:
        if isinstance(values.get(name), int) and not isinstance(values[name], bool):
            values[name] = float(values[name])
    return TrainSettings(**values)


def at_least_one(text: str) -> int:
    """Parse a count, for argparse.

    Args:
      text: What was typed.

    Returns:
      The number.

    Raises:
      argparse.ArgumentTypeError: Not an integer of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
