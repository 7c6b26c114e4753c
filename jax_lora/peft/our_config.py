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

    `config` is the PEFT configuration, `whole` has the paths of the fully trained leaves. Without
    `dtype`, the type is that of the first pair.
    """
    ranks, alphas = {}, {}
    for path, pair in pairs.items():
        for name, rank, scale in _kernels(path, pair):
            ranks[name] = rank
            # alpha = scale * rank, or scale * sqrt(rank) with rsLoRA.
            alphas[name] = scale * (np.sqrt(rank) if config["use_rslora"] else rank)
    rank = usual(ranks.values(), config["r"])
    alpha = usual(alphas.values(), config["lora_alpha"])
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
    ranks, scales = np.broadcast_arrays(
        pair.rank if pair.ranks is None else pair.ranks, np.asarray(pair.scale, np.float64)
    )
    if not ranks.ndim:
        yield path, int(ranks), float(scales)
        return
    for layer, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        if rank.max():
            yield paths.layer_path(path, layer), int(rank.max()), float(scale.max())


def usual(values: Iterable[Any], default: Any) -> Any:
    """Return the most frequent value, or the default if there are no values."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default
