"""Moves: what an operation on a weight does to the names of its axes, and to its factors.

W0 itself undergoes the operation. A `Move` says how the axes of the result are named, and which
steps keep the factors in agreement with W0. The same moves serve a weight with arrays (a `LowRank`)
and a weight of which only the names are known, which ignores the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jax_lora.algebra.low_rank import Axes, LowRank
from jax_lora.algebra.named_array import NamedArray
from jax_lora.algebra.named_axes import AxisName

Array = jax.Array
AlongAxis = Callable[[Array, int], Array]  # (array, axis) -> array; other axes are untouched
Step = Callable[[LowRank], LowRank | None]  # None: the result is not W0 plus a low-rank product


@dataclasses.dataclass(frozen=True)
class Move:
    """What an operation does to a weight.

    Args:
      axes: The name of every axis of the result.
      steps: What happens to the factors, in order.
      adds: Whether another array is added, so that the result may be data as well.
    """

    axes: Axes
    steps: tuple[Step, ...] = ()
    adds: bool = False


def moved(value: LowRank, move: Move) -> LowRank | None:
    """Apply the steps of a move to the factors.

    Args:
      value: The low-rank value.
      move: The move.

    Returns:
      The value with the names and factors of the result, for the caller to replace W0; None where
      the structure would be lost.
    """
    changed: LowRank | None = value
    for step in move.steps:
        changed = step(changed)
        if changed is None:
            return None
    return changed.replace(axes=move.axes)


# -----------------------------------------------------------------------------------------------
# Axes
# -----------------------------------------------------------------------------------------------


def drop(names: tuple[AxisName, ...]) -> Step:
    """Remove axes of size 1."""

    def on(factor: NamedArray) -> NamedArray:
        gone = [axis for axis, name in enumerate(factor.axes) if name in names]
        kept = tuple(name for name in factor.axes if name not in names)
        return NamedArray(lax.squeeze(factor.array, gone), kept)

    return lambda value: value.on_factors(on)


def regroup(old: tuple[AxisName, ...], new: tuple[AxisName, ...], sizes: tuple[int, ...]) -> Step:
    """Merge adjacent axes and split them again, all of them on one side.

    Args:
      old: Names before.
      new: Names after.
      sizes: Lengths of the new axes.
    """

    def on(factor: NamedArray) -> NamedArray:
        if old[0] not in factor.axes:
            return factor
        rest = [name for name in factor.axes if name not in old]
        before = [name for name in factor.axes[: factor.axes.index(old[0])] if name in rest]
        after = rest[len(before) :]
        order = [factor.axes.index(name) for name in (*before, *old, *after)]
        array = lax.transpose(factor.array, order)
        head, tail = array.shape[: len(before)], array.shape[len(before) + len(old) :]
        return NamedArray(lax.reshape(array, (*head, *sizes, *tail)), (*before, *new, *after))

    def step(value: LowRank) -> LowRank | None:
        if len({value.side(name) for name in old}) != 1:
            return None  # the group mixes inputs, outputs or stacks
        return value if old == new else value.on_factors(on)

    return step


def along(name: AxisName | None, operation: AlongAxis, start: Any = None) -> Step:
    """Slice, index or reverse one axis.

    Args:
      name: The axis.
      operation: What is done along it.
      start: Where a slice begins; layers of a stack drop different inputs.
    """

    def on(factor: NamedArray) -> NamedArray:
        if name not in factor.axes:
            return factor
        return NamedArray(operation(factor.array, factor.axes.index(name)), factor.axes)

    def step(value: LowRank) -> LowRank | None:
        if value.a is None:
            return value
        if name is None or (value.addend and name not in value.addend.axes):
            return None  # no factor has the axis, or some of the inputs of an addend would go
        if value.key is not None and start is not None and value.side(name) == (True, True):
            value = value.replace(key=jax.random.fold_in(value.key, start))
        return value.on_factors(on)

    return step


def gather_shards(name: AxisName | None, operation: AlongAxis, mesh_axes: frozenset[str]) -> Step:
    """Concatenate the shards of one axis, inside `shard_map`.

    Factors without the axis must be the same on every shard. JAX records over which mesh axes an
    array varies only under `check_vma`, where shards of W0 vary; otherwise the full weight is
    gathered.

    Args:
      name: The axis.
      operation: What gathers along it.
      mesh_axes: The axes of the mesh over which the shards lie.
    """

    def step(value: LowRank) -> LowRank | None:
        factors = (value.a, value.b, value.gain, value.addend)
        recorded = isinstance(value.base, Array) and mesh_axes <= _varies_over(value.base)
        agree = all(
            name in factor.axes or not mesh_axes & _varies_over(factor.array)
            for factor in factors
            if factor is not None
        )
        if value.a is not None and not (recorded and agree):
            return None
        return along(name, operation)(value)

    return step


def _varies_over(array: Array) -> frozenset[str]:
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)  # what other versions of JAX call `vma`
    return frozenset(getattr(kind, "vma", ()) or getattr(manual, "varying", ()))


def select(name: AxisName, operation: AlongAxis, new: tuple[AxisName, ...]) -> Step:
    """Take some entries of a stack axis.

    Args:
      name: The stack axis.
      operation: What takes the entries, and puts the new axes first.
      new: Names of the new axes.
    """

    def step(value: LowRank) -> LowRank | None:
        is_stack = value.a is None or value.side(name) == (True, True)
        return value.on_factors(selected(name, operation, new)) if is_stack else None

    return step


def selected(
    name: AxisName, operation: AlongAxis, new: tuple[AxisName, ...]
) -> Callable[[NamedArray], NamedArray]:
    """Return what `select` does to one factor."""

    def on(factor: NamedArray) -> NamedArray:
        if name not in factor.axes:
            return factor
        rest = tuple(other for other in factor.axes if other != name)
        return NamedArray(operation(factor.array, factor.axes.index(name)), (*new, *rest))

    return on


# -----------------------------------------------------------------------------------------------
# Values
# -----------------------------------------------------------------------------------------------


def everywhere(operation: Callable[[Array, tuple[AxisName, ...]], Array]) -> Step:
    """Apply `operation(array, axes)`, which keeps all axes, to every factor."""
    on = lambda factor: NamedArray(operation(factor.array, factor.axes), factor.axes)  # noqa: E731
    return lambda value: value.on_factors(on)


def multiply(by: Callable[[], NamedArray]) -> Step:
    """Multiply by an array that varies along axes of one side only."""

    def step(value: LowRank) -> LowRank | None:
        if value.addend is not None:
            return None  # the multiplication would not reach it
        if value.a is None:
            return value
        other = by()
        for name in ("b", "a"):
            factor = getattr(value, name)
            if {*other.axes} <= {*factor.axes}:
                spread = other.astype(factor.array.dtype).spread(factor.axes)
                return value.replace(**{name: NamedArray(factor.array * spread, factor.axes)})
        return None

    return step


def scale(factor: float) -> Step:
    """Multiply by a number that is known when the function is traced."""
    return lambda value: value.replace(scale=value.scale * factor) if value.addend is None else None


def shift(value: LowRank) -> LowRank | None:
    """Add an array to W0, unless a gain would multiply it."""
    return value if value.gain is None and value.addend is None else None
