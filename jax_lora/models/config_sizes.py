"""Check the sizes in a configuration against the shapes of the tensors, before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_lora.models.bitsandbytes_tensors import AnyTensor
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.model_errors import raise_model_error

__all__ = ["check_sizes"]

_STACKS = frozenset(("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"))
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
    problems = list(_problems(config, tensors))
    if problems:
        raise_model_error(
            folder,
            "tensors that do not fit config.json:\n    " + "\n    ".join(problems),
            "sizes that the tensors have",
            "check that config.json belongs to these files and that no shard is missing.",
        )


def _problems(config: Any, tensors: Mapping[str, AnyTensor]) -> Iterator[str]:
    widest = max((size for each in tensors.values() for size in each.shape), default=0)
    for name, value in _sizes(config):
        if name in _STACKS and value > len(tensors):
            yield f"{name} = {value}, but the files have {len(tensors)} tensors"
        elif name not in _STACKS and value > widest:
            yield f"{name} = {value}, but no axis of a tensor is longer than {widest}"


def _sizes(config: Any) -> Iterator[tuple[str, int]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is not int or field.name.endswith(_NOT_SIZES):
            continue
        if isinstance(config, DecoderConfig) and "position" in field.name:
            continue  # rotary positions have no tensor
        yield field.name, value
