"""Read the tensors of mlx-lm and loralib, which have the names `<module>.<factor>`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.peft.factors import Factors, join_modules
from jax_lora.peft.hf_modules import Site
from jax_lora.peft.our_config import our_config

_Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def read_factors(
    tensors: Mapping[str, np.ndarray],
    sites: Mapping[str, Site],
    names: tuple[str, str],
    *,
    transposed: bool = False,
) -> tuple[_Pairs, list[str]]:
    """Group tensors by module.

    `names` are those of the down-projection and of the up-projection. If `transposed`, the file has
    (r, in) and (out, r) instead of (in, r) and (r, out).

    Returns:
      `a` (in, r) and `b` (r, out) by module, and a list of problems.
    """
    problems: list[str] = []
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition(".")
        if module not in sites or factor not in names:
            problems.append(f"extra: {name} {tensor.shape}")
        else:
            parts.setdefault(module, {})[factor] = tensor
    found: _Pairs = {}
    for module, each in parts.items():
        problems += [f"missing: {module}.{name}" for name in names if name not in each]
        if len(each) == 2:
            a, b = (each[name].T if transposed else each[name] for name in names)
            kernel, rank = sites[module].leaf.kernel, a.shape[-1] if a.ndim else 0
            if rank and (a.shape, b.shape) == ((kernel.in_size, rank), (rank, kernel.out_size)):
                found[module] = a, b
                continue
            have = " and ".join(str(each[name].shape) for name in names)
            want = f"({kernel.in_size}, r) and (r, {kernel.out_size})"
            if transposed:
                want = f"(r, {kernel.in_size}) and ({kernel.out_size}, r)"
            problems.append(f"wrong shape: {module} has {have}, expected {want}")
    return found, problems


def assemble_factors(
    found: _Pairs,
    sites: Mapping[str, Site],
    scale_of_rank: Callable[[int], float],
    config: Mapping[str, Any],
    dtype: Any,
) -> Adapter:
    """Build an adapter from the factors by module and a PEFT configuration."""
    leaves = {site.leaf.path: site.leaf for site in sites.values()}
    factors = {m: Factors(a, b, scale_of_rank(a.shape[1])) for m, (a, b) in found.items()}
    pairs = join_modules(factors, sites, leaves, dtype)
    return Adapter(pairs, {}, our_config(config, pairs, (), dtype))
