"""The `LoraConfig` of an adapter that was loaded from another format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jax_lora import paths
from jax_lora.adapter import LoraPair
from jax_lora.config import LoraConfig


def our_config(
    config: Mapping[str, Any],
    pairs: Mapping[str, LoraPair],
    whole: Iterable[str],
    dtype: Any,
) -> LoraConfig:
    """Return a configuration with which `lora_init` creates pairs with the given ranks and scales.

    Args:
      config: The PEFT configuration.
      pairs: The pairs by path.
      whole: Paths of the fully trained leaves.
      dtype: Type of the factors; None for the type of the first pair.
    """
    ranks, alphas = {}, {}
    for path, pair in pairs.items():
        for name, rank, scale in _kernels(path, pair):
            ranks[name] = rank
            # alpha = scale * rank, or scale * sqrt(rank) with rsLoRA.
            alphas[name] = scale * (np.sqrt(rank) if config["use_rslora"] else rank)
    rank = _usual(ranks.values(), config["r"])
    alpha = _usual(alphas.values(), config["lora_alpha"])
    some = next(iter(pairs.values()), None)
    return LoraConfig(
        rank=rank,
        alpha=float(alpha),
        targets=tuple(pairs) or "all-linear",
        rank_pattern={name: each for name, each in ranks.items() if each != rank},
        alpha_pattern={name: float(each) for name, each in alphas.items() if each != alpha},
        modules_to_save=tuple(sorted(whole)),
        use_rslora=bool(config["use_rslora"]),
        use_dora=bool(config["use_dora"]),
        dropout=float(config["lora_dropout"] or 0.0),
        dtype=np.dtype(dtype or (some.a.dtype if some is not None else "float32")),
    )


def _kernels(path: str, pair: LoraPair) -> Iterable[tuple[str, int, float]]:
    """Yield path, rank and scale of each kernel with an update; a layer has its own path."""
    ranks = np.asarray(pair.rank if pair.ranks is None else pair.ranks)
    scales = np.asarray(pair.scale, np.float64)
    if not ranks.ndim and not scales.ndim:
        yield path, int(ranks), float(scales)
        return
    count = (ranks if ranks.ndim else scales).shape[0]
    for layer in range(count):
        rank = int(np.max(ranks[layer] if ranks.ndim else ranks))
        scale = float(np.max(scales[layer] if scales.ndim else scales))
        if rank:
            yield paths.layer_path(path, layer), rank, scale


def _usual(values: Iterable[Any], default: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default
