"""Factors: the update of one module, apart from the stack that holds it.

    Adapter  --split-->  {module: Factors}  --join-->  Adapter

Every format of adapters is a way to write `Factors` down.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import LoraPair
from jax_lora.peft.hf_modules import Leaf


@dataclasses.dataclass(frozen=True)
class Factors:
    """The update of one module, scale * a @ b, as NumPy arrays.

    Args:
      a: `(in, r)`; for experts that share a module, `(experts, in, r)`.
      b: `(r, out)`, or `(experts, r, out)`.
      scale: Factor in front.
      magnitude: `(out,)` of DoRA, or None.
      bias: `(out,)` that b's product gets added, or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.a.shape[-1]


def split(pair: LoraPair, leaf: Leaf) -> dict[str, Factors]:
    """Take a pair apart into the factors of its modules, zero padding left off.

    Args:
      pair: The pair.
      leaf: The leaf that it belongs to.

    Returns:
      Factors by the module's name; none for a layer that has no update.
    """
    found = {}
    stack = len(pair.stack_axes)
    ins = math.prod(pair.a.shape[stack:-1])
    # Several input or output axes are one in torch.
    a = np.asarray(pair.a).reshape(*pair.a.shape[:stack], ins, pair.rank)
    b = np.asarray(pair.b).reshape(*pair.b.shape[: stack + 1], -1)
    ranks = None if pair.ranks is None else np.asarray(pair.ranks)
    scales = np.asarray(pair.scale, np.float64)
    for module, position in leaf.modules():
        rank = pair.rank if ranks is None else int(np.max(ranks[position]))
        if rank:
            found[module] = Factors(
                a=a[position][..., :rank],
                b=b[position][..., :rank, :],
                scale=float(np.max(scales[position] if scales.ndim else scales)),
                magnitude=_part(pair.magnitude, position),
                bias=_part(pair.bias, position),
            )
    return found


def _part(array: Any, position: tuple[int, ...]) -> np.ndarray | None:
    return None if array is None else np.asarray(array)[position].reshape(-1)


def join(leaf: Leaf, found: Mapping[tuple[int, ...], Factors], dtype: Any) -> LoraPair:
    """Put the factors of a leaf's modules together, padded with zeros to the largest rank.

    Args:
      leaf: The leaf.
      found: Factors by position in the stack; a position that is missing gets no update.
      dtype: Type of the factors; None keeps theirs.

    Returns:
      The pair.
    """
    kernel = leaf.kernel
    depth, stack = leaf.depth, kernel.stack_shape
    some = next(iter(found.values()))
    dtype = jnp.dtype(dtype or some.a.dtype)
    rank = max(each.rank for each in found.values())
    a = np.zeros((*stack, kernel.in_size, rank), dtype)
    b = np.zeros((*stack, rank, kernel.out_size), dtype)
    ranks = np.zeros(stack, np.int64)
    scales = np.zeros(stack, np.float64)
    for position, each in found.items():
        a[position][..., : each.rank] = each.a.astype(dtype)
        b[position][..., : each.rank, :] = each.b.astype(dtype)
        ranks[position], scales[position] = each.rank, each.scale
    used = {each.scale for each in found.values()}
    return LoraPair(
        a=jnp.asarray(a.reshape(*stack, *kernel.in_shape, rank)),
        b=jnp.asarray(b.reshape(*stack, rank, *kernel.out_shape)),
        in_axes=kernel.in_axes,
        out_axes=kernel.out_axes,
        stack_axes=kernel.stack_axes,
        # Positions without an update need no scale of their own: their factors are zero.
        scale=used.pop() if len(used) == 1 else _nested(scales),
        ranks=_nested(ranks) if stack[:depth] and len(set(ranks.flat)) > 1 else None,
        **_vectors(leaf, found, dtype),
    )


def _vectors(leaf: Leaf, found: Mapping[tuple[int, ...], Factors], dtype: Any) -> dict[str, Any]:
    """Stack magnitudes and biases, where there are any."""
    stacked = {}
    for name in ("magnitude", "bias"):
        parts = {position: getattr(each, name) for position, each in found.items()}
        if all(part is None for part in parts.values()):
            continue
        whole = np.zeros((*leaf.kernel.stack_shape, leaf.kernel.out_size), dtype)
        for position, part in parts.items():
            if part is not None:
                whole[position] = part.astype(dtype)
        shape = (*leaf.kernel.stack_shape, *leaf.kernel.out_shape)
        stacked[name] = jnp.asarray(whole.reshape(shape))
    return stacked


def _nested(values: np.ndarray) -> Any:
    if values.ndim == 0:
        return values.item()
    return tuple(_nested(each) for each in values)
