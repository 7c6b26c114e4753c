"""All architectures that can be loaded, by the `model_type` of their `config.json`."""

from __future__ import annotations

from typing import Any

from jax_lora.errors import ModelError
from jax_lora.models import gpt2, t5
from jax_lora.models.architectures import DECODERS
from jax_lora.models.bert import ENCODERS
from jax_lora.models.family import Family

_ALL = (*DECODERS, *ENCODERS, gpt2.FAMILY, t5.FAMILY)
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in sorted(_ALL, key=lambda each: each.model_type)
}


def family_of(model: Any) -> Family:
    """Return the family of a module.

    Raises:
      ModelError: If the module is not of an architecture of this package.
    """
    found = next((each for each in FAMILIES.values() if type(model) is each.module), None)
    if found is None:
        got, expected = f"a {type(model).__name__}", "a module of jax_lora.models"
        fix = "use what jax_lora.models.load returned, or one of the package's classes."
        raise ModelError("model", got=got, expected=expected, fix=fix)
    return found


def family_of_config(config: Any) -> Family:
    """Return the family of a configuration."""
    return next(each for each in FAMILIES.values() if type(config) is each.config)
