"""The scale of a module: alpha / r, where `alpha_pattern` can set alpha per module.

PEFT patterns are regular expressions from an untrusted file. Only patterns with few repetitions and
without repeated groups are matched, whose run time is bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from jax_lora.errors import AdapterFileError

_MOST_CHARACTERS = 300
_MOST_REPETITIONS = 4
_REPETITION = re.compile(r"(?<!\\)[*+{]")
# A repeated group, or a repetition of a repetition, whose run time can be exponential.
_NESTED = re.compile(r"\)[*+{?]|[*+?}][*+{]|\(\?")


def value_of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a module name, or the default.

    Raises:
      AdapterFileError: A pattern is not a valid regular expression, or its run time may be
        exponential.

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
        raise _refusal(pattern, "a regular expression whose run time may be exponential")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise _refusal(pattern, f"an invalid regular expression: {error}") from error


def _refusal(pattern: str, got: str) -> AdapterFileError:
    return AdapterFileError(
        f"rank_pattern or alpha_pattern: {pattern[:80]!r}",
        got=got,
        expected="module names, with few repetitions and without repeated groups",
        fix="List the module names instead.",
    )


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale of the update of a module: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), section 4.1; rsLoRA (arXiv:2312.03732), equation 2.
    """
    alpha = value_of(config["alpha_pattern"] or {}, module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
