"""Factors: the update of one PyTorch module, independent of layer stacks and file formats.

Adapter  --split-->  {module: Factors}  --join-->  Adapter
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, LoraPair
from jax_lora.peft.hf_modules import Leaf, Site


@dataclasses.dataclass(frozen=True)
class Factors:
    """The update of one module, scale * a @ b, as NumPy arrays."""

    a: np.ndarray  # (in, r); for experts in one module, (experts, in, r)
    b: np.ndarray  # (r, out) or (experts, r, out)
    scale: float
    magnitude: np.ndarray | None = None  # of DoRA, (out,)
    bias: np.ndarray | None = None  # of B, (out,)

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.a.shape[-1]

    def folded(self) -> Factors:
        """Return the same update with the scale multiplied into b and the bias."""
        scale = np.float32(self.scale)
        bias = None if self.bias is None else self.bias * scale
        return dataclasses.replace(self, b=self.b * scale, bias=bias, scale=1.0)


def split(pair: LoraPair, leaf: Leaf) -> dict[str, Factors]:
    """Split a pair into the factors of the modules that have an update, without zero padding."""
    found = {}
    pair = jax.tree.map(np.asarray, pair)
    stack = len(pair.stack_axes)
    ins = math.prod(pair.a.shape[stack:-1])
    # A PyTorch weight has one input axis and one output axis.
    a = pair.a.reshape(*pair.a.shape[:stack], ins, pair.rank)
    b = pair.b.reshape(*pair.b.shape[: stack + 1], -1)
    ranks = None if pair.ranks is None else np.asarray(pair.ranks)
    scales = np.asarray(pair.scale, np.float64)
    for module, position in leaf.modules():
        rank = pair.rank if ranks is None else int(np.max(ranks[position]))
        if rank:
            own_b, scale = _one_scale(b[position], scales[position] if scales.ndim else scales)
            found[module] = Factors(
                a=a[position][..., :rank],
                b=own_b[..., :rank, :],
                scale=scale,
                magnitude=_part(pair.magnitude, position),
                bias=_part(pair.bias, position),
            )
    return found


def _one_scale(b: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, float]:
    """Return b and the scale of a module; its experts may differ in scale, which b then absorbs."""
    scale = float(max(scales.flat, key=abs))
    if scales.ndim and (scales != scale).any():
        b = b * (scales / scale).astype(b.dtype)[:, None, None]  # (experts, r, out)
    return b, scale


def _part(array: np.ndarray | None, position: tuple[int, ...]) -> np.ndarray | None:
    return None if array is None else array[position].reshape(-1)


def in_columns(factors: Factors, columns: tuple[int, int], size: int) -> Factors:
    """Widen the update of one module to the `size` columns of a kernel that holds several modules.

    The module has the columns (start, stop).
    """
    start, stop = columns

    def widened(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(start, size - stop)])

    vectors = {name: widened(getattr(factors, name)) for name in ("magnitude", "bias")}
    return dataclasses.replace(factors, b=widened(factors.b), **vectors)


def add(one: Factors, other: Factors) -> Factors:
    """Add two updates of a kernel: a1 @ b1 + a2 @ b2 = [a1, a2] @ [[b1], [b2]], of rank r1 + r2.

    Different scales are folded into b. The magnitudes must have values in different columns.
    """
    if one.scale != other.scale:
        one, other = one.folded(), other.folded()
    return Factors(
        a=np.concatenate([one.a, other.a], axis=-1),
        b=np.concatenate([one.b, other.b], axis=-2),
        scale=one.scale,
        magnitude=_sum(one.magnitude, other.magnitude),
        bias=_sum(one.bias, other.bias),
    )


def _sum(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def join_modules(
    found: Mapping[str, Factors], sites: Mapping[str, Site], leaves: Mapping[str, Leaf], dtype: Any
) -> dict[str, LoraPair]:
    """Join factors by module to pairs by path; modules side by side in one kernel are added."""
    by_path: dict[str, dict[tuple[int, ...], Factors]] = {}
    for module, factors in found.items():
        leaf, position = sites[module].leaf, sites[module].position
        if leaf.columns is not None:
            factors = in_columns(factors, leaf.columns, leaves[leaf.path].kernel.out_size)
        at = by_path.setdefault(leaf.path, {})
        at[position] = add(at[position], factors) if position in at else factors
    return {path: join(leaves[path], each, dtype) for path, each in sorted(by_path.items())}


def join(leaf: Leaf, found: Mapping[tuple[int, ...], Factors], dtype: Any) -> LoraPair:
    """Join the factors of the modules of a leaf, with zero padding to the largest rank.

    `found` has the factors by position in the stack; other positions have no update. Without
    `dtype`, the result has the type of the factors.
    """
    kernel = leaf.kernel
    stack = kernel.stack_shape
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
        ranks=_nested(ranks) if len(set(ranks.flat)) > 1 else None,
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

    `parameters` says whether the library supports experts and routers.
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
