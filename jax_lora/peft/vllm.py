"""What vLLM takes: plain factors, one rank for all, and one scale.

vLLM reads `r` and `lora_alpha` and no patterns, so a module with a scale of its own would be served
wrong without a word. Scales are folded into B, and alpha is r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.errors import AdapterFileError, format_error
from jax_lora.peft.adapter_config import forget
from jax_lora.peft.factors import Factors
from jax_lora.peft.hf_modules import Site


def check(adapter: Adapter, found: Mapping[str, Factors], sites: Mapping[str, Site]) -> None:
    """Refuse what vLLM cannot serve, all of it in one message.

    Args:
      adapter: The adapter.
      found: Factors by module.
      sites: Their sites.

    Raises:
      AdapterFileError: It has something that vLLM refuses, or would leave out without a word.
    """
    problems = [f"{path}: trained whole; vLLM takes factors only" for path in adapter.whole]
    problems += [f"{path}: trained rows; vLLM takes factors only" for path in adapter.rows]
    for module, factors in found.items():
        if factors.magnitude is not None:
            problems.append(f"{module}: DoRA's magnitude; vLLM has no DoRA")
        if factors.bias is not None:
            problems.append(f"{module}: a bias on B; vLLM has none")
        if sites[module].leaf.is_parameter:
            problems.append(f"{module}: a parameter of a module with several; vLLM takes modules")
    if problems:
        raise AdapterFileError(
            format_error(
                "target='vllm'",
                got="".join(f"\n    {problem}" for problem in problems),
                expected="factors of plain modules, which is all that vLLM serves",
                fix="Serve the merged model instead: jl.models.save(path, model, jl.merge(...)).",
            )
        )


def uniform(adapter: Adapter, found: Mapping[str, Factors]) -> tuple[Adapter, dict[str, Factors]]:
    """Fold every scale into B, and pad every rank to the largest with zeros.

    Args:
      adapter: The adapter.
      found: Factors by module.

    Returns:
      An adapter whose configuration says so, and the factors with scale 1.
    """
    rank = max(each.rank for each in found.values())
    config = dataclasses.replace(
        forget(adapter.config), rank=rank, alpha=float(rank), use_rslora=False
    )
    folded = {module: _folded(each, rank) for module, each in found.items()}
    return dataclasses.replace(adapter, config=config), folded


def _folded(factors: Factors, rank: int) -> Factors:
    missing = rank - factors.rank
    a = np.pad(factors.a, ((0, 0), (0, missing)))
    b = (factors.b.astype(np.float32) * np.float32(factors.scale)).astype(factors.b.dtype)
    return Factors(a, np.pad(b, ((0, missing), (0, 0))), 1.0)
