"""The architectures that can be loaded, by the `model_type` of their `config.json`."""

from __future__ import annotations

from typing import Any

from jax_lora.errors import ModelError, format_error
from jax_lora.models import (
    bert,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    t5,
)
from jax_lora.models.family import Family

__all__ = ["FAMILIES", "family_of", "family_of_config"]

_ARCHITECTURES = (
    bert,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    t5,
)
FAMILIES: dict[str, Family] = {each.FAMILY.model_type: each.FAMILY for each in _ARCHITECTURES}


def family_of(model: Any) -> Family:
    """The family of a module.

    Raises:
      ModelError: if the module is of no architecture of this package.
    """
    found = next((each for each in FAMILIES.values() if type(model) is each.module), None)
    if found is None:
        raise ModelError(
            format_error(
                "model",
                got=f"a {type(model).__name__}",
                expected="a module of jax_lora.models",
                fix="use what jax_lora.models.load returned, or one of the package's classes.",
            )
        )
    return found


def family_of_config(config: Any) -> Family:
    """The family of a configuration."""
    return next(each for each in FAMILIES.values() if type(config) is each.config)
