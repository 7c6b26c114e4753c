"""The scale of a module: alpha / r, where patterns may give a module an alpha of its own.

PEFT's patterns are regular expressions that come out of a file. They are matched here only if they
cannot take long: no repeated groups, and few repetitions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from jax_lora.errors import AdapterFileError, format_error

_MOST_CHARACTERS = 300
_MOST_REPETITIONS = 4
_REPETITION = re.compile(r"(?<!\\)[*+{]")
# A group or class that is repeated whole, or a repetition of a repetition: what may take for ever.
_NESTED = re.compile(r"\)[*+{?]|[*+?}][*+{]|\(\?")


def value_of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name, or the default.

    Args:
      patterns: Values by pattern, in the file's order.
      module: The module's name, without "base_model.model.".
      default: What holds otherwise.

    Returns:
      The value.

    Raises:
      AdapterFileError: A pattern that is no regular expression, or one that could take for ever.

    Example:
      >>> value_of({"q_proj": 4, "^model.layers.0": 5}, "model.layers.1.attn.q_proj", 8)
      4
      >>> value_of({"proj": 4}, "model.layers.1.attn.q_proj", 8)
      8
    """
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return default


def _compiled(pattern: str) -> re.Pattern[str]:
    long = len(pattern) > _MOST_CHARACTERS
    if long or _NESTED.search(pattern) or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS:
        raise _refusal(pattern, "a regular expression that could take very long")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise _refusal(pattern, f"no regular expression: {error}") from error


def _refusal(pattern: str, got: str) -> AdapterFileError:
    return AdapterFileError(
        format_error(
            f"rank_pattern or alpha_pattern: {pattern[:80]!r}",
            got=got,
            expected="names of modules, at most a few repetitions and no repeated groups",
            fix="Write the names out.",
        )
    )


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor in front of B @ A.

    Args:
      config: The adapter's configuration.
      module: The module's name.
      rank: The rank that its tensors have.

    Returns:
      alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), section 4.1; rsLoRA (arXiv:2312.03732), equation 2.
    """
    alpha = value_of(config["alpha_pattern"] or {}, module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
