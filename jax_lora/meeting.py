"""A meeting of data and a low-rank value: scale * (x · a) · b, in two thin products.

`narrow` takes x down to the rank, `widen` takes that up to the result. Values that meet the same
data are narrowed together, in one product: reading x is what a thin product costs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora import labelled
from jax_lora.labels import RANK, Label
from jax_lora.lowrank import LowRank, accumulation_dtype

Array = jax.Array
Labels = tuple[Label, ...]


@dataclasses.dataclass(frozen=True)
class Meeting:
    """How the axes of x and of a value's factors meet. It holds no array.

    Args:
      x_labels: A label per axis of x: the value's own where they meet, others elsewhere.
      a_labels: A label per axis of `a`.
      b_labels: A label per axis of `b`.
      a_first: Whether x meets `a` first; with `b` first, x was contracted with the outputs.
      out_labels: A label per axis of the result; None for an axis of size 1.
      out_shape: Shape of the result.
      scale: Factor in front of the product.
      dtype: Type of the result.
      precision: As in `lax.dot_general`.
      x_first: Whether x's own axes come before the kernel's in the result: only a hint, which
        saves a transpose.
    """

    x_labels: Labels
    a_labels: Labels
    b_labels: Labels
    a_first: bool
    out_labels: tuple[Label | None, ...]
    out_shape: tuple[int, ...]
    scale: float
    dtype: Any
    precision: Any
    x_first: bool

    @property
    def first_labels(self) -> Labels:
        """Labels of the factor that x meets."""
        return self.a_labels if self.a_first else self.b_labels

    @property
    def second_labels(self) -> Labels:
        """Labels of the factor that makes the result."""
        return self.b_labels if self.a_first else self.a_labels

    def order(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Return what belongs to `a` and to `b` in the order in which x meets them."""
        return (a, b) if self.a_first else (b, a)

    @property
    def met_axes(self) -> tuple[int, ...] | None:
        """Axes of x that the first factor sums away, if that is all that meets; else None."""
        met = [axis for axis, label in enumerate(self.x_labels) if label in self.first_labels]
        others = {*self.second_labels, *self.out_labels}
        labels = {self.x_labels[axis] for axis in met}
        plain = labels == {*self.first_labels} - {RANK} and not labels & others
        plain = plain and not any(label in self.second_labels for label in self.x_labels)
        return tuple(met) if plain else None


def meet(
    value: LowRank,
    x: Array,
    x_labels: Sequence[Label],
    out_labels: Sequence[Label | None],
    out_shape: Sequence[int],
    *,
    dtype: Any,
    precision: Any = None,
    x_first: bool = True,
) -> Meeting | None:
    """Describe a contraction of x with a value's axes.

    Args:
      value: The low-rank value; W0 takes no part.
      x: Data.
      x_labels: A label per axis of `x`.
      out_labels: A label per axis of the result; None for an axis of size 1.
      out_shape: Shape of the result.
      dtype: Type of the result.
      precision: As in `lax.dot_general`.
      x_first: Whether x's own axes come before the kernel's in the result.

    Returns:
      The meeting, or None if x meets neither factor, so that a @ b would have to be formed.
    """
    sizes = dict(zip(x_labels, x.shape, strict=True))
    met = [
        [label for label in sizes if label in have and label not in out_labels]
        for have in (value.a_labels, value.b_labels)
    ]
    if not any(met):
        return None
    by_a, by_b = (math.prod(sizes[label] for label in labels) for labels in met)
    return Meeting(
        x_labels=tuple(x_labels),
        a_labels=value.a_labels,
        b_labels=value.b_labels,
        a_first=by_a >= by_b,  # the factor that contracts more of x away
        out_labels=tuple(out_labels),
        out_shape=tuple(out_shape),
        scale=value.scale,
        dtype=jnp.dtype(dtype),
        precision=precision,
        x_first=x_first,
    )


def add(meetings: Sequence[Meeting], x: Array, factors: Sequence[tuple[Array, Array]]) -> list:
    """Compute scale * (x · a) · b for every value that meets the same data.

    Args:
      meetings: A meeting per value.
      x: The data of all of them.
      factors: `(a, b)` per value.

    Returns:
      What the factors add to each contraction, in the results' own shapes.
    """
    return _add(tuple(meetings), x, factors)


@functools.partial(jax.jit, static_argnums=0)  # layers that are alike are traced once
def _add(
    meetings: tuple[Meeting, ...], x: Array, factors: Sequence[tuple[Array, Array]]
) -> list[Array]:
    ordered = [m.order(a, b) for m, (a, b) in zip(meetings, factors, strict=True)]
    thins = narrow(meetings, x, [first for first, _ in ordered])
    return [
        widen(m, *thin, second)
        for m, thin, (_, second) in zip(meetings, thins, ordered, strict=True)
    ]


Thin = tuple[Array, Sequence[Label]]  # (tokens, r) and its labels


def narrow(
    meetings: Sequence[Meeting], x: Array, firsts: Sequence[Array], *, hidden: bool = True
) -> list[Thin]:
    """Contract x with the first factor of each value: together where they sum the same axes.

    Args:
      meetings: A meeting per value, all with the same precision.
      x: Data, (tokens, in).
      firsts: The factors that x meets, (in, r) each.
      hidden: As in `labelled.product`.

    Returns:
      Per value, scale * x · first and its labels.
    """
    leader, met = meetings[0], meetings[0].met_axes
    if len(meetings) == 1 or met is None or any(m.met_axes != met for m in meetings):
        return [_narrow_one(m, x, first, hidden) for m, first in zip(meetings, firsts, strict=True)]
    aligned = [
        lax.transpose(
            first, [m.first_labels.index(label) for label in (*(m.x_labels[i] for i in met), RANK)]
        ).astype(x.dtype)
        for m, first in zip(meetings, firsts, strict=True)
    ]
    beside = lax.concatenate(aligned, len(met))  # (in, sum of r)
    together = (*(leader.x_labels[axis] for axis in met), RANK)
    thin, labels = _contract(leader, x, beside, together, hidden)  # (tokens, sum of r)
    pieces = lax.split(thin, [each.shape[-1] for each in aligned], axis=labels.index(RANK))
    return [(_scaled(m, piece, x.dtype), labels) for m, piece in zip(meetings, pieces, strict=True)]


def _narrow_one(meeting: Meeting, x: Array, first: Array, hidden: bool) -> Thin:
    thin, labels = _contract(meeting, x, first.astype(x.dtype), meeting.first_labels, hidden)
    return _scaled(meeting, thin, x.dtype), labels


def _contract(
    meeting: Meeting, x: Array, first: Array, labels: Labels, hidden: bool
) -> tuple[Array, list]:
    keep = {*meeting.out_labels, *meeting.second_labels}
    wide = accumulation_dtype(x.dtype)  # accumulated in float32 or wider
    return labelled.product(
        x, meeting.x_labels, first, labels, keep, meeting.precision, wide, hidden=hidden
    )


def _scaled(meeting: Meeting, thin: Array, dtype: Any) -> Array:
    """Scale where there are the fewest numbers, then round once."""
    return (thin * jnp.asarray(meeting.scale, thin.dtype)).astype(dtype)


def widen(
    meeting: Meeting, thin: Array, labels: Sequence[Label], second: Array, *, hidden: bool = True
) -> Array:
    """Multiply by the other factor, and lay the product out as the contraction's result.

    Args:
      meeting: The meeting.
      thin: scale * x · first, (tokens, r).
      labels: A label per axis of `thin`.
      second: The other factor, (r, out).
      hidden: As in `labelled.product`.

    Returns:
      An array of `meeting.out_shape`.
    """
    pair = ((thin, labels), (second.astype(thin.dtype), meeting.second_labels))
    (left, left_labels), (right, right_labels) = pair if meeting.x_first else pair[::-1]
    keep = set(meeting.out_labels)
    result, have = labelled.product(
        left,
        left_labels,
        right,
        right_labels,
        keep,
        meeting.precision,
        meeting.dtype,
        hidden=hidden,
    )
    return labelled.arrange(result, have, meeting.out_labels, meeting.out_shape)
