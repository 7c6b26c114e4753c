"""DoRA: a trained magnitude for every output, beside a direction that low rank changes.

    W' = m / ||W0 + scale * a @ b|| * (W0 + scale * a @ b)

The norm is taken over the input axes, so there is one per output, and counts as a constant when
differentiating. `gain`, m over the norm, is all that the rest of the library sees of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lora import labelled
from jax_lora.labels import RANK, Label
from jax_lora.lowrank import accumulation_dtype
from jax_lora.pair import LoraPair

Array = jax.Array
_OTHER_RANK: Label = "other rank"


def magnitude(base: Array, pair: LoraPair, dtype: Any) -> Array:
    """Return the magnitude that training starts from: the norms of W0, so that W' is W0.

    Args:
      base: W0.
      pair: The pair that it goes into, of which the axes are read.
      dtype: Type of the result.

    Returns:
      `(*stack, *out)`; zeros for the layers of a stack that are left out.
    """
    norms = jnp.sqrt(_squares(base, pair.in_axes, pair.vector_labels)).astype(dtype)
    return jnp.where(_has_update(pair), norms, jnp.zeros((), dtype))


def gain(base: Array, pair: LoraPair) -> Array:
    """Return m / ||W0 + scale * a @ b||: what the plain update's results are multiplied by.

    Nothing of W0's size is formed: ||W + D||^2 = ||W||^2 + 2 W·D + ||D||^2, and the last two need
    W·a and a·a only. At the start D is zero and the first term is the magnitude's own but for the
    order in which a compiler adds it up, so a magnitude that close to the norm is taken for it:
    the gain is exactly 1. An output whose weights are all zero has a gain of 1.

    Args:
      base: W0.
      pair: A pair with a magnitude.

    Returns:
      `(*stack, *out)`, differentiable by the magnitude alone.

    Reference:
      Liu et al., DoRA (arXiv:2402.09353), equation 5, and section 4.3 for the constant norm.
    """
    wide = accumulation_dtype(base.dtype)
    norms = _norms(*map(lax.stop_gradient, (base, pair)))  # (*stack, *out)
    safe = jnp.where(norms == 0, jnp.ones((), wide), norms)
    # Not m / norm: some devices divide so fast that x / x is not 1.
    ratio = 1 + _beyond_rounding(pair.magnitude.astype(wide) - safe, safe) / safe
    used = (norms != 0) & jnp.asarray(_has_update(pair))
    return jnp.where(used, ratio, jnp.ones((), wide))


def _beyond_rounding(difference: Array, norms: Array) -> Array:
    """Take a difference for zero if rounding the norm can be all of it; its derivative stays 1."""
    noise = 8 * jnp.finfo(norms.dtype).eps * norms
    small = jnp.abs(difference) <= noise.astype(norms.dtype)
    rounding = jnp.where(small, difference, jnp.zeros_like(difference))
    return difference - lax.stop_gradient(rounding)


def rescaled(formed: Array, base: Array, pair: LoraPair) -> Array:
    """Apply the gain to a weight that is formed.

    Args:
      formed: W0 + scale * a @ b.
      base: W0.
      pair: A pair with a magnitude.

    Returns:
      m / ||W0 + scale * a @ b|| * (W0 + scale * a @ b), in the type of `formed`.
    """
    spread = labelled.spread(gain(base, pair), pair.vector_labels, range(formed.ndim))
    return formed * spread.astype(formed.dtype)


def _has_update(pair: LoraPair) -> np.ndarray:
    """Mark the layers that are not left out: broadcasts against a magnitude."""
    axes = len(pair.stack_axes) + len(pair.out_axes)
    if pair.ranks is None:
        return np.ones((1,) * axes, bool)
    used = np.asarray(pair.ranks) > 0  # (*stack,)
    return used.reshape(*used.shape, *(1,) * len(pair.out_axes))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _squares(w: Array, in_axes: tuple[int, ...], vector_labels: tuple[Label, ...]) -> Array:
    """Sum the squares of every output's weights: (*stack, *out).

    The barriers keep what is around it out of the sum, so that its bits do not depend on that.
    """
    wide = lax.optimization_barrier(w).astype(accumulation_dtype(w.dtype))
    squares = lax.optimization_barrier(jnp.sum(wide * wide, in_axes))
    kept = [axis for axis in range(w.ndim) if axis not in in_axes]
    return labelled.arrange(squares, kept, vector_labels, _sizes(w, vector_labels))


@jax.jit
def _norms(w: Array, pair: LoraPair) -> Array:
    wide = accumulation_dtype(w.dtype)
    (b, scale), labels = pair.scaled_b(), (*pair.stack_axes, RANK, *pair.out_axes)
    b = b.astype(wide) * jnp.asarray(scale, wide)  # (*stack, r, *out)
    wa = _w_times_a(w, pair, labels)  # (*stack, r, *out)
    a = pair.a.astype(wide)
    aa, have = labelled.product(  # (*stack, r, r)
        a, pair.a_labels, a, _renamed(pair.a_labels), {*labels, _OTHER_RANK}, "highest"
    )
    aab, have = labelled.product(aa, have, b, _renamed(pair.b_labels), labels, "highest")
    aab = labelled.arrange(aab, have, labels, b.shape)
    more = jnp.sum(b * (2 * wa + aab), len(pair.stack_axes))  # (*stack, *out)
    squares = _squares(w, pair.in_axes, pair.vector_labels) + more
    return jnp.sqrt(jnp.maximum(squares, jnp.zeros((), wide)))


def _w_times_a(w: Array, pair: LoraPair, labels: Sequence[Label]) -> Array:
    """Contract W0 with a over the inputs, at the precision of float32: (*stack, r, *out)."""
    wide, w_labels = accumulation_dtype(w.dtype), tuple(range(w.ndim))
    # W0 is not cast up, which would copy it: two parts of a, each of W0's type, are as precise.
    a = pair.a.astype(wide)
    parts = [a.astype(w.dtype)]
    if w.dtype != wide:
        parts.append((a - parts[0].astype(wide)).astype(w.dtype))
    beside = lax.concatenate(parts, a.ndim - 1)  # (*stack, *in, parts * r)
    product, have = labelled.product(w, w_labels, beside, pair.a_labels, labels, "highest", wide)
    shape = (*_sizes(w, pair.stack_axes), beside.shape[-1], *_sizes(w, pair.out_axes))
    product = labelled.arrange(product, have, labels, shape)
    axis = len(pair.stack_axes)
    return functools.reduce(lax.add, lax.split(product, [pair.rank] * len(parts), axis=axis))


def _renamed(labels: Sequence[Label]) -> tuple[Label, ...]:
    return tuple(_OTHER_RANK if label == RANK else label for label in labels)


def _sizes(w: Array, axes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(w.shape[axis] for axis in axes)
