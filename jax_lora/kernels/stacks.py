"""Layers of a stack: which of them get an adapter, and of what rank and scale each.

A stack is one leaf that holds the kernels of many layers. A pattern names one of them by the path
that it would have on its own, with its index in it: `layers/3/attn/q_proj/kernel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_lora import paths
from jax_lora.config import LoraConfig
from jax_lora.errors import NoMatchError, format_error
from jax_lora.kernels.kernel import Kernel

Nested = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Extent:
    """How far the update of one leaf reaches: its ranks and scales.

    Args:
      rank: Rank of the factors; in a stack whose layers differ, the largest.
      ranks: Rank of every kernel of the stack where they differ, nested in the stack's shape.
      scale: One number, or nested tuples in the stack's shape where scales differ.
    """

    rank: int
    ranks: Nested | None
    scale: float | Nested


def extent(kernel: Kernel, config: LoraConfig) -> Extent:
    """Work out the ranks and scales that a configuration gives to one leaf.

    Args:
      kernel: The leaf; at least one of its layers has an adapter.
      config: What to adapt.

    Returns:
      Its `Extent`. A layer that is left out has rank 0.
    """
    active = active_layers(kernel, config)
    if active is None:
        rank = config.rank_of(kernel.path)
        return Extent(rank, None, config.scale(rank, config.alpha_of(kernel.path)))
    ranks, scales = [0] * kernel.stack_shape[0], [0.0] * kernel.stack_shape[0]
    for index in active:
        names = (kernel.path, paths.layer_path(kernel.path, index))
        ranks[index] = config.rank_of(*names)
        scales[index] = config.scale(ranks[index], config.alpha_of(*names))
    differ = len(set(ranks)) > 1
    used = {scales[index] for index in active}
    return Extent(
        rank=max(ranks),
        ranks=_over_stack(ranks, kernel) if differ else None,
        # Layers that are left out need no scale of their own: their factors are zero.
        scale=used.pop() if len(used) == 1 else _over_stack(scales, kernel),
    )


def active_layers(kernel: Kernel, config: LoraConfig) -> tuple[int, ...] | None:
    """Return the indices of a stack's layers that get an adapter; None for a leaf of one kernel."""
    if not kernel.stack_axes:
        return None
    count = kernel.stack_shape[0]
    if config.layers is None:
        return tuple(range(count))
    return tuple(index for index in config.layers if index < count)


def with_layers(kernels: Mapping[str, Kernel], config: LoraConfig) -> dict[str, Kernel]:
    """Leave out the stacks of which no layer gets an adapter.

    Args:
      kernels: The kernels that were chosen by name.
      config: What to adapt.

    Returns:
      The rest; leaves that are no stacks among them.

    Raises:
      NoMatchError: One of the `layers` is in no stack.
    """
    if config.layers is None:
        return dict(kernels)
    longest = max((k.stack_shape[0] for k in kernels.values() if k.stack_axes), default=0)
    missing = [str(index) for index in config.layers if index >= longest]
    if missing:
        raise NoMatchError(
            format_error(
                f"LoraConfig: layers={config.layers}",
                got=f"no layer {', '.join(missing)} in any stack; the longest has {longest}",
                expected=f"indices below {longest}" if longest else "kernels stacked by layer",
                fix="Correct the indices; they count from 0."
                if longest
                else "Pass kernels=jl.find_kernels(...), or name unstacked layers in targets.",
            )
        )
    return {path: k for path, k in kernels.items() if active_layers(k, config) != ()}


def names(kernels: Mapping[str, Kernel], config: LoraConfig) -> list[str]:
    """List what a pattern may name: the leaves, and every adapted layer of the stacks."""
    layered = [
        paths.layer_path(path, index)
        for path, kernel in kernels.items()
        for index in active_layers(kernel, config) or ()
    ]
    return [*kernels, *layered]


def rank_mask(ranks: Nested, rank: int, inner: int) -> np.ndarray:
    """Mark the columns of `a` that are in use: `(*stack, 1, ..., 1, rank)` of bools.

    Args:
      ranks: Rank of every kernel of the stack.
      rank: Rank of the factors.
      inner: How many axes `a` has between the stack and the rank.

    Returns:
      A mask that broadcasts against `a`.
    """
    used = np.arange(rank) < np.asarray(ranks)[..., None]  # (*stack, rank)
    return used.reshape(*used.shape[:-1], *(1,) * inner, rank)


def _over_stack(values: list[Any], kernel: Kernel) -> Nested:
    """Repeat a value per layer over the other stack axes, as experts within layers have."""

    def repeat(value: Any, sizes: tuple[int, ...]) -> Any:
        return tuple(repeat(value, sizes[1:]) for _ in range(sizes[0])) if sizes else value

    return tuple(repeat(value, kernel.stack_shape[1:]) for value in values)
