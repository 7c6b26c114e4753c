"""Factors: the update of one PyTorch module, independent of layer stacks and file formats.

Adapter  --split-->  {module: Factors}  --join-->  Adapter
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, LoraPair
from jax_lora.peft.hf_modules import Leaf, Site


@dataclasses.dataclass(frozen=True)
class Factors:
    """The update of one module, scale * a @ b, as NumPy arrays.

    Args:
      a: Down-projection, `(in, r)`; for experts in one module, `(experts, in, r)`.
      b: Up-projection, `(r, out)` or `(experts, r, out)`.
      scale: Scale of the update.
      magnitude: Magnitude of DoRA, `(out,)`, or None.
      bias: Bias of B, `(out,)`, or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.a.shape[-1]


def split(pair: LoraPair, leaf: Leaf) -> dict[str, Factors]:
    """Split a pair into the factors of the modules that have an update, without zero padding."""
    found = {}
    stack = len(pair.stack_axes)
    ins = math.prod(pair.a.shape[stack:-1])
    # A PyTorch weight has one input axis and one output axis.
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
    """Join the factors of the modules of a leaf, with zero padding to the largest rank.

    Args:
      leaf: The leaf.
      found: Factors by position in the stack; other positions have no update.
      dtype: Type of the result, or None for the type of the factors.
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
        # The scale of a position without an update is arbitrary, as its factors are zero.
        scale=used.pop() if len(used) == 1 else _nested(scales),
        ranks=_nested(ranks) if stack[:depth] and len(set(ranks.flat)) > 1 else None,
        **_vectors(leaf, found, dtype),
    )


def _vectors(leaf: Leaf, found: Mapping[tuple[int, ...], Factors], dtype: Any) -> dict[str, Any]:
    """Stack the magnitudes and biases."""
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


def unsupported(
    adapter: Adapter,
    found: Mapping[str, Factors],
    sites: Mapping[str, Site],
    *,
    parameters: bool = False,
) -> Iterator[str]:
    """Yield the parts of an adapter that libraries other than PEFT do not support.

    Args:
      adapter: The adapter.
      found: Its factors by module.
      sites: The modules.
      parameters: Whether the library supports experts and routers.
    """
    yield from (f"{path}: a fully trained leaf" for path in adapter.whole)
    yield from (f"{path}: trained rows of a table" for path in adapter.rows)
    for module, factors in found.items():
        if factors.magnitude is not None:
            yield f"{module}: a magnitude (DoRA)"
        if factors.bias is not None:
            yield f"{module}: a bias of B"
        if sites[module].leaf.is_parameter and not parameters:
            yield f"{module}: a parameter of a module with several parameters"
