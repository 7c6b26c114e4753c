"""Limits on untrusted files. Each has a name, and can be raised by that name.

The environment variable `JAX_LORA_LIMITS` replaces defaults: `json_bytes=64000000,json_depth=200`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from jax_lora.errors import ConfigError

VARIABLE = "JAX_LORA_LIMITS"

# SECURITY.md lists them; a test compares the two.
DEFAULTS: Mapping[str, int] = {
    "config_bytes": 2**20,  # config.json and other settings
    "json_bytes": 16 * 2**20,
    "index_bytes": 32 * 2**20,
    "tokenizer_bytes": 128 * 2**20,
    "json_depth": 100,  # of YAML too
    "yaml_bytes": 64 * 2**10,
    "yaml_nodes": 100_000,  # with aliases replaced by what they name
    "layers": 10_000,
    "data_bytes": 8 * 2**30,
    "array_index_bytes": 64 * 2**20,  # of a checkpoint, expanded
    "metrics_bytes": 256 * 2**20,
    # A compressed file may expand to this many bytes, or by this factor if that is more.
    "expanded_bytes": 64 * 2**20,
    "expansion": 200,
    "template_bytes": 64 * 2**10,
    "template_seconds": 10,
    "template_memory_bytes": 2**30,
    "template_output_bytes": 16 * 2**20,
}


def limit(name: str) -> int:
    """Return a limit, in the unit of its name: the default, or its value in `JAX_LORA_LIMITS`.

    Raises:
      ConfigError: The environment variable has an unknown name, or a value that is not a positive
        integer.

    Example:
      >>> limit("json_depth")
      100
    """
    return _replaced().get(name, DEFAULTS[name])


def expanded_limit(stored: int) -> int:
    """Return how many bytes a compressed file of `stored` bytes may expand to.

    Example:
      >>> expanded_limit(1000) == limit("expanded_bytes")
      True
    """
    return max(limit("expanded_bytes"), limit("expansion") * stored)


def limit_hint(name: str) -> str:
    """Return the sentence that tells a user how to raise a limit."""
    return f"If you trust the file, raise the limit: {VARIABLE}={name}=N"


def _replaced() -> dict[str, int]:
    items = filter(None, os.environ.get(VARIABLE, "").split(","))
    return dict(_parse(item) for item in items)


def _parse(item: str) -> tuple[str, int]:
    name, _, value = (part.strip() for part in item.partition("="))
    if name not in DEFAULTS or not value.isdecimal() or not value.isascii() or int(value) == 0:
        expected = f"NAME=N with N above 0 and NAME one of {', '.join(DEFAULTS)}"
        fix = f"Write for example {VARIABLE}=json_bytes=64000000."
        raise ConfigError(f"environment variable {VARIABLE}", got=item, expected=expected, fix=fix)
    return name, int(value)
