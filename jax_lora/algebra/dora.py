"""DoRA: a trained magnitude m per output, and a low-rank update of the direction.

    W' = m / ||W|| * W,    W = W0 + D,    D = scale * a @ b

||W|| has one norm per output, over the input axes. It is constant under differentiation. Other
modules use only the gain, m / ||W||. Where names are short, w is W0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.algebra.base_weight import Base, as_array
from jax_lora.algebra.low_rank import accumulation_dtype
from jax_lora.algebra.named_array import NamedArray, product
from jax_lora.algebra.named_axes import RANK, AxisName

Array = jax.Array
_OTHER_RANK: AxisName = "other rank"


def magnitude(base: Base, in_axes: Sequence[int], out_names: Sequence[AxisName]) -> Array:
    """Return the initial magnitude, for which W' is W0: the norms of W0, in float32 or wider.

    `out_names` has the stack and output axes of W0 in the order of the result, (*stack, *out).
    """
    return jnp.sqrt(_squares(base, tuple(in_axes), tuple(out_names)))


def gain(
    base: Base, a: NamedArray, b: NamedArray, scale: float, magnitude: NamedArray, used: Any
) -> NamedArray:
    """Return the gain m / ||W0 + D||, by which the results of plain LoRA are multiplied.

    No array of W0's size is computed: ||W0 + D||^2 = ||W0||^2 + 2 W0·D + ||D||^2, and the last two
    terms need only W0·a and a·a. Initially D is zero and m is ||W0||, so the gain has to be 1. As
    the two can be summed in different orders, a difference within the rounding error counts as
    zero, and the gain is exactly 1. The gain of an output whose weights are all zero is 1.

    Args:
      base: W0: an array, or a `Recipe` that computes it.
      a: `(*stack, *in, rank)`.
      b: `(*stack, rank, *out)`.
      scale: Multiplier of a @ b.
      magnitude: m, `(*stack, *out)`.
      used: A mask that broadcasts against m: False for the layers that have no update.

    Returns:
      `(*stack, *out)`, with a derivative with respect to m only.

    Reference:
      Liu et al., DoRA (arXiv:2402.09353), equation 5, and section 4.3 for the constant norm.
    """
    wide = accumulation_dtype(base.dtype)
    frozen = jax.tree.map(lax.stop_gradient, (base, a, b))
    norms = _norms(*frozen, scale, magnitude.axes)  # (*stack, *out)
    safe = jnp.where(norms == 0, jnp.ones((), wide), norms)
    # Not m / norm: on some devices fast division makes x / x differ from 1.
    ratio = 1 + _beyond_rounding(magnitude.array.astype(wide) - safe, safe) / safe
    used = (norms != 0) & jnp.asarray(used)
    return NamedArray(jnp.where(used, ratio, jnp.ones((), wide)), magnitude.axes)


def _beyond_rounding(difference: Array, norms: Array) -> Array:
    """Set differences within the rounding error of the norm to zero, with a derivative of 1."""
    noise = 8 * jnp.finfo(norms.dtype).eps * norms
    small = jnp.abs(difference) <= noise.astype(norms.dtype)
    rounding = jnp.where(small, difference, jnp.zeros_like(difference))
    return difference - lax.stop_gradient(rounding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _squares(base: Base, in_axes: tuple[int, ...], out_names: tuple[AxisName, ...]) -> Array:
    """Sum the squares of the weights of every output: (*stack, *out).

    The barriers prevent fusion with surrounding operations, which would change the bits.
    """
    w = as_array(base)
    wide = lax.optimization_barrier(w).astype(accumulation_dtype(w.dtype))
    squares = lax.optimization_barrier(jnp.sum(wide * wide, in_axes))
    kept = tuple(axis for axis in range(w.ndim) if axis not in in_axes)
    named = NamedArray(squares, kept)
    return named.arranged(out_names, [named.size_of(name) for name in out_names])


@functools.partial(jax.jit, static_argnums=(3, 4))
def _norms(
    base: Base, a: NamedArray, b: NamedArray, scale: float, out_names: tuple[AxisName, ...]
) -> Array:
    """Compute ||W0 + D||: (*stack, *out)."""
    w = as_array(base)
    wide = accumulation_dtype(w.dtype)
    stack = len([name for name in out_names if name in a.axes])
    b = NamedArray(b.array.astype(wide) * jnp.asarray(scale, wide), b.axes)  # (*stack, r, *out)
    wa = _w_times_a(w, a, b)  # (*stack, r, *out)
    a = a.astype(wide)
    keep = {*b.axes, _OTHER_RANK}
    aa = product(a, _renamed(a), keep, "highest")  # (*stack, r, r)
    aab = product(aa, _renamed(b), b.axes, "highest").arranged(b.axes, b.array.shape)
    # 2 W0·D + ||D||^2 = b · (2 W0·a + a·a·b), summed over the rank.
    update_terms = jnp.sum(b.array * (2 * wa + aab), stack)  # (*stack, *out)
    in_axes = tuple(axis for axis in range(w.ndim) if axis not in out_names)
    squares = _squares(w, in_axes, out_names) + update_terms
    return jnp.sqrt(jnp.maximum(squares, jnp.zeros((), wide)))


def _w_times_a(w: Array, a: NamedArray, b: NamedArray) -> Array:
    """Contract W0 with a over the inputs in float32 precision: (*stack, r, *out)."""
    wide = accumulation_dtype(w.dtype)
    # Casting W0 would copy it. Splitting a into two parts of W0's type is equally precise.
    full = a.array.astype(wide)
    parts = [full.astype(w.dtype)]
    if w.dtype != wide:
        parts.append((full - parts[0].astype(wide)).astype(w.dtype))
    a_parts = NamedArray(lax.concatenate(parts, full.ndim - 1), a.axes)  # (*stack, *in, parts * r)
    named = NamedArray(w, tuple(range(w.ndim)))
    # XLA for CPU multiplies bfloat16 into float32 only if axes with the same role are merged.
    result = product(named, a_parts, b.axes, "highest", wide, flatten=True)
    axis = b.axes.index(RANK)
    shape = (*b.array.shape[:axis], a_parts.array.shape[-1], *b.array.shape[axis + 1 :])
    pieces = lax.split(result.arranged(b.axes, shape), [a.size_of(RANK)] * len(parts), axis=axis)
    return functools.reduce(lax.add, pieces)


def _renamed(factor: NamedArray) -> NamedArray:
    names = tuple(_OTHER_RANK if name == RANK else name for name in factor.axes)
    return NamedArray(factor.array, names)
