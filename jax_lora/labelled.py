"""Products of arrays whose axes have labels: axes meet by name, not by place.

A product is issued as a `dot_general` with a batch dimension, of size 1 where there is no other,
unless asked otherwise. A rematerialization policy such as `dots_with_no_batch_dims_saveable` is
about the model's own products; it shall not keep what the factors add to them as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax import lax

from jax_lora.labels import Label

Array = jax.Array


def product(
    left: Array,
    left_labels: Sequence[Label],
    right: Array,
    right_labels: Sequence[Label],
    keep: Collection[Label | None],
    precision: Any = None,
    dtype: Any = None,
    *,
    hidden: bool = True,
) -> tuple[Array, list[Label]]:
    """Multiply two arrays and sum over the labels that nobody keeps.

    Args:
      left: An array.
      left_labels: A label per axis of it.
      right: Another array.
      right_labels: A label per axis of it.
      keep: Labels that stay in the result.
      precision: As in `lax.dot_general`.
      dtype: Type of the result; by default what the operands give.
      hidden: Whether policies are not to see it. A tangent, which they never see, needs no batch
        dimension: without one, XLA turns its transpose into a product of another order.

    Returns:
      The product, with the labels that both had in front, then left's own, then right's own; and
      its labels.
    """
    left, left_labels = _drop_unmet(left, left_labels, {*right_labels, *keep})
    right, right_labels = _drop_unmet(right, right_labels, {*left_labels, *keep})
    role = _roles(left_labels, right_labels, keep)
    left_groups = _groups(left_labels, right_labels, role, _may_flatten(left))
    right_groups = _groups(right_labels, left_labels, role, _may_flatten(right))
    if {*left_groups} & {*right_groups} != {*filter(_of(role, "kept", "summed"), left_groups)}:
        # The operands hold their common axes in different orders: leave these as they are.
        left_groups, right_groups = ([(x,) for x in each] for each in (left_labels, right_labels))
    summed = list(filter(_of(role, "summed"), left_groups))
    kept = list(filter(_of(role, "kept"), left_groups))
    free = [
        *filter(_of(role, "free"), left_groups),
        *filter(_of(role, "free"), right_groups),
    ]
    left, sizes = _flattened(left, left_labels, left_groups)
    right, more = _flattened(right, right_labels, right_groups)
    result = _dot(left, left_groups, right, right_groups, summed, kept, hidden, precision, dtype)
    labels = [label for group in (*kept, *free) for label in group]
    return _reshape(result, [{**sizes, **more}[label] for label in labels]), labels


def _roles(
    left: Sequence[Label], right: Sequence[Label], keep: Collection[Label | None]
) -> dict[Label, str]:
    both = {label for label in left if label in right}
    kind = lambda label: "free" if label not in both else "kept" if label in keep else "summed"  # noqa: E731
    return {label: kind(label) for label in (*left, *right)}


def _of(role: dict[Label, str], *wanted: str) -> Callable[[tuple[Label, ...]], bool]:
    return lambda group: role[group[0]] in wanted


def _may_flatten(array: Array) -> bool:
    """Tell whether adjacent axes may be merged: it pays on CPU, and moves data between devices.

    XLA for CPU runs a contraction over (batch, sequence) far slower than one over tokens. On other
    platforms nothing is gained, and merging two axes that are both sharded costs a gather.
    """
    if jax.default_backend() != "cpu":
        return False
    sharding = getattr(jax.typeof(array), "sharding", None)
    return not any(axis is not None for axis in getattr(sharding, "spec", ()))


def _groups(
    labels: Sequence[Label], others: Sequence[Label], role: dict[Label, str], merge: bool
) -> list[tuple[Label, ...]]:
    """Group axes that may become one: the same role, and side by side in both operands."""
    groups: list[tuple[Label, ...]] = []
    for label in labels:
        last = groups[-1][-1] if groups else None
        joins = merge and groups and role[last] == role[label]
        if joins and role[label] != "free":
            joins = list(others).index(label) == list(others).index(last) + 1
        if joins:
            groups[-1] = (*groups[-1], label)
        else:
            groups.append((label,))
    return groups


def _flattened(
    array: Array, labels: Sequence[Label], groups: Sequence[tuple[Label, ...]]
) -> tuple[Array, dict[Label, int]]:
    sizes = dict(zip(labels, array.shape, strict=True))
    shape = [math.prod(sizes[label] for label in group) for group in groups]
    return _reshape(array, shape), sizes


def _dot(
    left: Array,
    left_groups: Sequence[Any],
    right: Array,
    right_groups: Sequence[Any],
    summed: Sequence[Any],
    kept: Sequence[Any],
    hidden: bool,
    precision: Any,
    dtype: Any,
) -> Array:
    hide = hidden and not kept
    if hide:  # see the top of this file
        left, right = lax.expand_dims(left, [0]), lax.expand_dims(right, [0])
    axes = lambda groups, of: tuple(list(of).index(group) + hide for group in groups)  # noqa: E731
    batch = ((0,), (0,)) if hide else (axes(kept, left_groups), axes(kept, right_groups))
    numbers = ((axes(summed, left_groups), axes(summed, right_groups)), batch)
    result = lax.dot_general(
        left, right, numbers, precision=precision, preferred_element_type=dtype
    )
    return lax.squeeze(result, [0]) if hide else result


def _drop_unmet(
    array: Array, labels: Sequence[Label], wanted: Collection[Label | None]
) -> tuple[Array, list[Label]]:
    gone = [axis for axis, label in enumerate(labels) if label not in wanted]
    if gone:
        array = lax.reduce_sum(array, gone)
    return array, [label for label in labels if label in wanted]


def _reshape(array: Array, shape: Sequence[int]) -> Array:
    return array if array.shape == tuple(shape) else lax.reshape(array, tuple(shape))


def arrange(
    array: Array, have: Sequence[Label], want: Sequence[Label | None], shape: Sequence[int]
) -> Array:
    """Put axes in the order wanted, with the axes of size 1 that the array lacks.

    Args:
      array: An array.
      have: A label per axis of it.
      want: A label per axis of the result; None for an axis of size 1.
      shape: Shape of the result.

    Returns:
      An array of that shape.
    """
    order = [list(have).index(label) for label in want if label in have]
    if order != sorted(order):
        array = lax.transpose(array, order)
    return _reshape(array, shape)


def spread(array: Array, have: Sequence[Label], want: Sequence[Label | None]) -> Array:
    """Lay an array out for broadcasting against `want`, with size 1 where it has no axis.

    Args:
      array: An array.
      have: A label per axis of it, all of them in `want`.
      want: A label per axis of what it is to be broadcast against.

    Returns:
      An array with one axis per entry of `want`.
    """
    order = [label for label in want if label in have]
    array = lax.transpose(array, [list(have).index(label) for label in order])
    return lax.expand_dims(array, [axis for axis, label in enumerate(want) if label not in have])
