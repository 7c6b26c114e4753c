"""Convert an adapter for vLLM, which supports only factors of one rank and one scale.

vLLM reads `r` and `lora_alpha` but ignores patterns, so it would silently use wrong scales. The
scales are therefore multiplied into B, and alpha is set to r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.errors import AdapterFileError
from jax_lora.peft.adapter_config import forget
from jax_lora.peft.factors import Factors, unsupported
from jax_lora.peft.hf_modules import Site


def check(adapter: Adapter, found: Mapping[str, Factors], sites: Mapping[str, Site]) -> None:
    """Raise an `AdapterFileError` for the parts that vLLM would refuse or silently ignore."""
    if problems := list(unsupported(adapter, found, sites)):
        raise AdapterFileError(
            "target='vllm'",
            got=problems,
            expected="only LoRA factors of modules with one weight, as vLLM supports no others",
            fix="Serve the merged model: jl.models.save(path, model, jl.merge(...)).",
        )


def uniform(adapter: Adapter, found: Mapping[str, Factors]) -> tuple[Adapter, dict[str, Factors]]:
    """Return the adapter with one rank and scale 1, and its factors, padded with zeros."""
    rank = max(each.rank for each in found.values())
    kept = forget(adapter.config)
    config = dataclasses.replace(kept, rank=rank, alpha=float(rank), use_rslora=False)
    folded = {module: _folded(each, rank) for module, each in found.items()}
    return dataclasses.replace(adapter, config=config), folded


def _folded(factors: Factors, rank: int) -> Factors:
    missing = rank - factors.rank
    a = np.pad(factors.a, ((0, 0), (0, missing)))
    b = (factors.b.astype(np.float32) * np.float32(factors.scale)).astype(factors.b.dtype)
    return Factors(a, np.pad(b, ((0, missing), (0, 0))), 1.0)
