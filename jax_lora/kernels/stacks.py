"""Layer stacks: which layers of a stacked leaf get an adapter, with which ranks and scales.

A stacked leaf holds the kernels of all layers. A pattern can match a single layer by its path with
the layer index: `layers/3/attn/q_proj/kernel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_lora import paths
from jax_lora.config import LoraConfig
from jax_lora.errors import NoMatchError
from jax_lora.kernels.kernel import Kernel

Nested = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class RanksAndScales:
    """The ranks and scales of the update of one leaf.

    Args:
      rank: Rank of the factors: the largest rank of a stack.
      ranks: Rank of every kernel of the stack as nested tuples, or None if they are equal.
      scale: The scale, or nested tuples of the shape of the stack if scales differ.
    """

    rank: int
    ranks: Nested | None
    scale: float | Nested


def ranks_and_scales(kernel: Kernel, config: LoraConfig) -> RanksAndScales:
    """Return the ranks and scales of one leaf under a configuration.

    Args:
      kernel: The leaf, with an adapter in at least one layer.
      config: The configuration.

    Returns:
      The ranks and scales; a layer without an adapter has rank 0.
    """
    active = active_layers(kernel, config)
    if active is None:
        rank = config.rank_of(kernel.path)
        return RanksAndScales(rank, None, config.scale(rank, config.alpha_of(kernel.path)))
    ranks, scales = [0] * kernel.stack_shape[0], [0.0] * kernel.stack_shape[0]
    for index in active:
        both = (kernel.path, paths.layer_path(kernel.path, index))
        ranks[index] = config.rank_of(*both)
        scales[index] = config.scale(ranks[index], config.alpha_of(*both))
    differ = len(set(ranks)) > 1
    used = {scales[index] for index in active}
    return RanksAndScales(
        rank=max(ranks),
        ranks=_over_stack(ranks, kernel) if differ else None,
        # The scale of a layer without an adapter is arbitrary, as its factors are zero.
        scale=used.pop() if len(used) == 1 else _over_stack(scales, kernel),
    )


def active_layers(kernel: Kernel, config: LoraConfig) -> tuple[int, ...] | None:
    """Return the indices of the adapted layers of one leaf; None if the leaf is not stacked."""
    if not kernel.stack_axes:
        return None
    count = kernel.stack_shape[0]
    if config.layers is None:
        return tuple(range(count))
    return tuple(index for index in config.layers if index < count)


def with_active_layers(kernels: Mapping[str, Kernel], config: LoraConfig) -> dict[str, Kernel]:
    """Filter out the stacks in which no layer gets an adapter.

    Args:
      kernels: The kernels that were selected by name.
      config: The configuration.

    Returns:
      The other kernels, including those that are not stacked.

    Raises:
      NoMatchError: An index of `config.layers` is not in any stack.
    """
    if config.layers is None:
        return dict(kernels)
    longest = max((k.stack_shape[0] for k in kernels.values() if k.stack_axes), default=0)
    missing = [str(index) for index in config.layers if index >= longest]
    if missing:
        raise NoMatchError(
            f"LoraConfig: layers={config.layers}",
            got=f"no layer {', '.join(missing)}; the largest stack has {longest} layers",
            expected=f"indices below {longest}" if longest else "kernels stacked by layer",
            fix="Correct the indices, which count from 0."
            if longest
            else "Pass kernels=jl.find_kernels(...), or name unstacked layers in targets.",
        )
    return {path: k for path, k in kernels.items() if active_layers(k, config) != ()}


def matchable_paths(kernels: Mapping[str, Kernel], config: LoraConfig) -> list[str]:
    """List the paths that a pattern can match: leaves, and adapted layers of stacks."""
    layered = [
        paths.layer_path(path, index)
        for path, kernel in kernels.items()
        for index in active_layers(kernel, config) or ()
    ]
    return [*kernels, *layered]


def rank_mask(ranks: Nested, rank: int, inner: int) -> np.ndarray:
    """Return a mask of the columns of `a` within each rank: bool `(*stack, 1, ..., 1, rank)`.

    Args:
      ranks: Rank of every kernel of the stack.
      rank: Rank of the factors.
      inner: Number of axes of `a` between the stack and the rank.

    Returns:
      A mask that broadcasts against `a`.
    """
    used = np.arange(rank) < np.asarray(ranks)[..., None]  # (*stack, rank)
    return used.reshape(*used.shape[:-1], *(1,) * inner, rank)


def _over_stack(values: list[Any], kernel: Kernel) -> Nested:
    """Repeat a value per layer over further stack axes, such as experts."""

    def repeat(value: Any, sizes: tuple[int, ...]) -> Any:
        return tuple(repeat(value, sizes[1:]) for _ in range(sizes[0])) if sizes else value

    return tuple(repeat(value, kernel.stack_shape[1:]) for value in values)
