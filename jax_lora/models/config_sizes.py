"""Check the sizes in a configuration against the shapes of the tensors, before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_lora.errors import ModelError
from jax_lora.models.bitsandbytes_tensors import AnyTensor
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.read_config import STACKS

# Integers that are not the size of an axis.
_NOT_SIZES = ("_token_id", "_window", "_pattern", "_distance", "_per_tok")


def check_sizes(folder: Path, config: Any, tensors: Mapping[str, AnyTensor]) -> None:
    """Raise if the files cannot have the sizes of the configuration.

    A few bytes of `config.json` can declare a model of any size; building its shapes would take
    hours. This check takes milliseconds, and does not replace the comparison of every shape.

    Raises:
      ModelError: A layer count is larger than the number of tensors, or a size is larger than
        every axis of the tensors.
    """
    check_fit(folder, list(_problems(config, tensors)), "sizes that the tensors have")


def check_fit(folder: Path, problems: list[str], expected: str) -> None:
    """Raise a `ModelError` if there are problems with the tensors of a folder."""
    if problems:
        got = "tensors that do not fit config.json:\n    " + "\n    ".join(problems)
        fix = "check that config.json belongs to these files and that no shard is missing."
        raise ModelError(folder, got=got, expected=expected, fix=fix)


def _problems(config: Any, tensors: Mapping[str, AnyTensor]) -> Iterator[str]:
    widest = max((size for each in tensors.values() for size in each.shape), default=0)
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if type(value) is not int or name.endswith(_NOT_SIZES):
            continue
        if isinstance(config, DecoderConfig) and "position" in name:
            continue  # rotary positions have no tensor
        if name in STACKS and value > len(tensors):
            yield f"{name} = {value}, but the files have {len(tensors)} tensors"
        elif name not in STACKS and value > widest:
            yield f"{name} = {value}, but no axis of a tensor is longer than {widest}"
