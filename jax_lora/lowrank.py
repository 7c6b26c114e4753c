"""Low-rank values: gain * (W0 + scale * a @ b), carried through array operations unformed.

Every axis of W0 has a label (labels.py). An axis is an input axis if `a` has its label, an output
axis if `b` has it, and a stack axis (layers, experts) if both have. Structural operations change
labels and factors together; meeting.py is where a low-rank value meets data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora import labelled
from jax_lora import labels as labelling
from jax_lora.labels import Label

Array = jax.Array
Labels = tuple[Label, ...]
FACTORS = ("a", "b", "gain", "bias")  # what goes along with W0; each has its labels beside it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """W0 + scale * sum over rank of a and b, times a gain if there is one, with labelled axes.

    Args:
      w: W0, frozen, in its present shape.
      a: Factor that holds the input axes, the stack axes and the rank.
      b: Factor that holds the stack axes, the rank and the output axes.
      key: Random key for dropout on the factors' input, or None.
      w_labels: A label per axis of `w`; None for an axis of size 1 that no factor has.
      a_labels: A label per axis of `a`, one of them RANK.
      b_labels: A label per axis of `b`, one of them RANK.
      scale: Factor in front of the product.
      rate: Dropout rate; 0 without a key.
      path: Name of the leaf, for messages.
      gain: What all is multiplied by along stack and output axes (DoRA), or None.
      gain_labels: A label per axis of `gain`.
      bias: What is added to a product with all inputs, or None. It is no part of the value that
        this stands for.
      bias_labels: A label per axis of `bias`.
    """

    w: Array
    a: Array
    b: Array
    key: Array | None
    w_labels: tuple[Label | None, ...] = dataclasses.field(metadata={"static": True})
    a_labels: tuple[Label, ...] = dataclasses.field(metadata={"static": True})
    b_labels: tuple[Label, ...] = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    rate: float = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    gain: Array | None = None
    gain_labels: tuple[Label, ...] = dataclasses.field(default=(), metadata={"static": True})
    bias: Array | None = None
    bias_labels: tuple[Label, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value that this stands for."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """Type of the value that this stands for."""
        return self.w.dtype

    def side(self, label: Label | None) -> tuple[bool, bool]:
        """Tell whether `a` and whether `b` have a label."""
        return label in self.a_labels, label in self.b_labels

    @property
    def is_matrix(self) -> bool:
        """Whether inputs and outputs are both still there: a row or a column is cheap to form."""
        sides = {self.side(label) for label in self.w_labels if label is not None}
        return (True, False) in sides and (False, True) in sides

    def replace(self, **changes: Any) -> LowRank:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def on_factors(self, change: Callable[[Any, Labels], tuple[Any, Labels]]) -> LowRank:
        """Change `a`, `b`, gain and bias, each with its labels, and leave W0 to the caller."""
        changes = {}
        for name in FACTORS:
            if (factor := getattr(self, name)) is not None:
                changed = change(factor, getattr(self, f"{name}_labels"))
                changes[name], changes[f"{name}_labels"] = changed
        return self.replace(**changes)


def accumulation_dtype(dtype: Any) -> Any:
    """Return the type to add products in: float64 for float64, float32 for all that is narrower."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


# -----------------------------------------------------------------------------------------------
# Forming the value
# -----------------------------------------------------------------------------------------------


def delta(value: LowRank, dtype: Any = jnp.float32) -> Array:
    """Form scale * a @ b in the shape of W0, without the gain.

    Args:
      value: The low-rank value.
      dtype: Type to compute in and return.

    Returns:
      An array of W0's shape.
    """
    a, b = value.a.astype(dtype), value.b.astype(dtype)
    out = tuple(label for label in value.w_labels if label is not None)
    product, have = labelled.product(a, value.a_labels, b, value.b_labels, out, "highest")
    product = product * jnp.asarray(value.scale, dtype)  # (stack, in, out) in some order
    return labelled.arrange(product, have, value.w_labels, value.shape)


def materialize(value: LowRank) -> Array:
    """Form the whole value, computed in float32 or wider and rounded once to W0's type.

    Args:
      value: The low-rank value.

    Returns:
      An array of W0's shape and type.
    """
    wide = accumulation_dtype(value.dtype)
    formed = value.w.astype(wide) + delta(value, wide)
    return gained(value, formed, value.w_labels).astype(value.dtype)


# -----------------------------------------------------------------------------------------------
# The gain
# -----------------------------------------------------------------------------------------------


def gained(
    value: LowRank, array: Array, labels: Sequence[Label | None], less: float = 0.0
) -> Array:
    """Multiply an array that has all of the gain's axes by the gain.

    Args:
      value: The low-rank value; without a gain, the array stays as it is.
      array: What is to be multiplied.
      labels: A label per axis of it.
      less: What to take off the gain before.

    Returns:
      An array of the same shape and type; the product is formed in float32 or wider.
    """
    if value.gain is None:
        return array
    wide = jnp.promote_types(value.gain.dtype, accumulation_dtype(array.dtype))
    gain = labelled.spread(value.gain.astype(wide) - less, value.gain_labels, labels)
    return (array.astype(wide) * gain).astype(array.dtype)


def sums_all_inputs(value: LowRank, summed: Collection[Label | None]) -> bool:
    """Tell whether a product over these labels is the one that a bias belongs to."""
    return set(summed) == {*value.a_labels} - {*value.b_labels} and all(
        label in value.w_labels for label in value.bias_labels
    )


def biased(value: LowRank, array: Array, labels: Sequence[Label | None]) -> Array:
    """Add the bias, if there is one, to a product with all inputs.

    Args:
      value: The low-rank value.
      array: The product.
      labels: A label per axis of it.

    Returns:
      An array of the same shape and type.
    """
    if value.bias is None:
        return array
    wide = accumulation_dtype(array.dtype)
    bias = labelled.spread(value.bias.astype(wide), value.bias_labels, labels)
    return (array.astype(wide) + bias).astype(array.dtype)


def joined(
    value: LowRank,
    base: Array,
    added: Array,
    labels: Sequence[Label | None],
    again: Array | None = None,
) -> Array:
    """Put together what W0 and what the factors make of some data, and apply the gain.

    Args:
      value: The low-rank value.
      base: What W0 makes of the data.
      added: What the factors make of it.
      labels: A label per axis of both.
      again: What W0 makes of the data that the factors saw, where dropout changed them: only that
        is rescaled, as only the branch that is trained sees dropout.

    Returns:
      gain * (base + added), or base + (gain - 1) * again + gain * added.
    """
    if value.gain is None:
        return lax.add(base, added)
    if again is None:
        return gained(value, lax.add(base, added), labels)
    return base + gained(value, again, labels, less=1.0) + gained(value, added, labels)


# -----------------------------------------------------------------------------------------------
# Structural operations: each returns a low-rank value, or None where the structure would be lost
# -----------------------------------------------------------------------------------------------


def transpose(value: LowRank, permutation: Sequence[int]) -> LowRank:
    """Permute the axes; the factors stay as they are."""
    permuted = tuple(value.w_labels[axis] for axis in permutation)
    return value.replace(w=lax.transpose(value.w, permutation), w_labels=permuted)


def reshape(value: LowRank, shape: Sequence[int]) -> LowRank | None:
    """Merge and cut axes, as long as every group of axes lies on one side."""
    flat = squeeze(value, [axis for axis, size in enumerate(value.shape) if size == 1])
    new_axes = [axis for axis, size in enumerate(shape) if size != 1]
    groups = labelling.reshape_groups(flat.shape, [shape[axis] for axis in new_axes])
    if groups is None:
        return None
    new_labels: list[Label | None] = [None] * len(shape)
    result = flat
    for old_group, new_group in groups:
        olds = [flat.w_labels[axis] for axis in old_group]
        axes = [new_axes[axis] for axis in new_group]
        if len({flat.side(label) for label in olds}) != 1:
            return None  # the group mixes inputs, outputs or stacks
        news = labelling.relabel(olds, [shape[axis] for axis in axes])
        result = _reshape_factors(result, olds, news, [shape[axis] for axis in axes])
        for axis, label in zip(axes, news, strict=True):
            new_labels[axis] = label
    return result.replace(w=lax.reshape(value.w, tuple(shape)), w_labels=tuple(new_labels))


def _reshape_factors(
    value: LowRank, olds: Sequence[Label], news: Sequence[Label], sizes: Sequence[int]
) -> LowRank:
    if list(olds) == list(news):
        return value
    return value.on_factors(lambda factor, have: _reshape_factor(factor, have, olds, news, sizes))


def _reshape_factor(
    factor: Array,
    have: tuple[Label, ...],
    olds: Sequence[Label],
    news: Sequence[Label],
    sizes: Sequence[int],
) -> tuple[Array, tuple[Label, ...]]:
    if olds[0] not in have:
        return factor, have
    rest = [label for label in have if label not in olds]
    place = [label for label in have[: have.index(olds[0])] if label in rest]
    order = [*place, *olds, *rest[len(place) :]]
    factor = lax.transpose(factor, [have.index(label) for label in order])
    head, tail = factor.shape[: len(place)], factor.shape[len(place) + len(olds) :]
    return lax.reshape(factor, (*head, *sizes, *tail)), (*place, *news, *rest[len(place) :])


def squeeze(value: LowRank, axes: Sequence[int]) -> LowRank:
    """Drop axes of size 1, from W0 and from the factors that have them."""
    gone = [value.w_labels[axis] for axis in axes if value.w_labels[axis] is not None]
    kept = tuple(label for axis, label in enumerate(value.w_labels) if axis not in axes)

    def drop(factor: Array, have: Labels) -> tuple[Array, Labels]:
        out = [axis for axis, label in enumerate(have) if label in gone]
        return lax.squeeze(factor, out), tuple(label for label in have if label not in gone)

    return value.on_factors(drop).replace(w=lax.squeeze(value.w, axes), w_labels=kept)


def expand(value: LowRank, shape: Sequence[int], kept_axes: Sequence[int]) -> LowRank | None:
    """Add axes of size 1 (`broadcast_in_dim` that repeats nothing)."""
    if math.prod(shape) != math.prod(value.shape):
        return None  # repeats the kernel
    new_labels: list[Label | None] = [None] * len(shape)
    for axis, label in zip(kept_axes, value.w_labels, strict=True):
        new_labels[axis] = label
    w = lax.broadcast_in_dim(value.w, shape, kept_axes)
    return value.replace(w=w, w_labels=tuple(new_labels))


def along_axis(
    value: LowRank, axis: int, operation: Callable[[Array, int], Array]
) -> LowRank | None:
    """Slice, index or reverse one axis: the same operation on W0 and on its factors.

    Args:
      value: The low-rank value.
      axis: Axis of W0.
      operation: `operation(array, axis)`, which acts on every position along the axis alike.

    Returns:
      The value with the operation done, or None if no factor has the axis, or if a bias would be
      left beside some of the inputs.
    """
    label = value.w_labels[axis]
    if label is None or (value.bias is not None and label not in value.bias_labels):
        return None

    def on(factor: Array, have: Labels) -> tuple[Array, Labels]:
        return (operation(factor, have.index(label)) if label in have else factor), have

    return value.on_factors(on).replace(w=operation(value.w, axis))


def multiply(value: LowRank, w: Array, other: Array, axes: Sequence[int]) -> LowRank | None:
    """Multiply by an array that varies along some axes only.

    Args:
      value: The low-rank value.
      w: W0 already multiplied.
      other: What it was multiplied by, with one axis per entry of `axes`.
      axes: The axes of W0 along which `other` varies.

    Returns:
      The product, or None where the axes lie on both sides.
    """
    wanted = [value.w_labels[axis] for axis in axes]
    for name in ("b", "a"):
        factor, have = getattr(value, name), getattr(value, f"{name}_labels")
        if all(label in have for label in wanted):
            spread = labelled.spread(other.astype(factor.dtype), wanted, have)
            return value.replace(w=w, **{name: factor * spread})
    return None


# -----------------------------------------------------------------------------------------------
# Dropout
# -----------------------------------------------------------------------------------------------


def dropped(value: LowRank, x: Array) -> Array:
    """Apply the value's dropout to data that is about to meet its factors.

    Args:
      value: The low-rank value with the key of this use.
      x: Data of any shape.

    Returns:
      x with a share of entries at zero and the rest scaled up, or x itself without a key.
    """
    if value.key is None or value.rate == 0.0:
        return x
    keep = jax.random.bernoulli(value.key, 1.0 - value.rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - value.rate, x.dtype), jnp.zeros((), x.dtype))
