"""Moves: the effect of an operation on the names of a weight's axes and on its factors.

The operation itself is applied to W0. A `Move` has the names of the resulting axes, and the steps
that apply the operation to the factors. `analyze`, which has only names, ignores the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax import lax

from jax_lora.algebra.low_rank import Axes, LowRank
from jax_lora.algebra.named_array import NamedArray
from jax_lora.algebra.named_axes import AxisName

Array = jax.Array
AlongAxis = Callable[[Array, int], Array]  # (array, axis) -> array; other axes are unchanged
Step = Callable[[LowRank], LowRank | None]  # None: the update of the result is not low-rank


@dataclasses.dataclass(frozen=True)
class Move:
    """The effect of an operation on a weight."""

    axes: Axes  # of the result
    steps: tuple[Step, ...] = ()  # the changes of the factors, in order
    adds: bool = False  # whether another array is added, so that the result may be data


def apply_move(value: LowRank, move: Move) -> LowRank | None:
    """Apply the steps of a move to the factors; the caller replaces W0 in the result.

    The result is None if the low-rank structure is lost.
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


def drop(names: Collection[AxisName | None]) -> Step:
    """Remove axes of size 1."""

    def on(factor: NamedArray) -> NamedArray:
        removed = [axis for axis, name in enumerate(factor.axes) if name in names]
        kept = tuple(name for name in factor.axes if name not in names)
        return NamedArray(lax.squeeze(factor.array, removed), kept)

    return lambda value: value.on_factors(on)


def regroup(old: tuple[AxisName, ...], new: tuple[AxisName, ...], sizes: tuple[int, ...]) -> Step:
    """Merge adjacent axes of one factor, and split the merged axis into axes of these sizes."""

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
            return None  # the group mixes input, output and stack axes
        return value if old == new else value.on_factors(on)

    return step


def along_axis(name: AxisName | None, operation: AlongAxis, start: Any = None) -> Step:
    """Slice, index or reverse one axis; the dropout key of a layer is derived from its `start`."""
    on = _on_axis(name, lambda factor, axis: NamedArray(operation(factor.array, axis), factor.axes))

    def step(value: LowRank) -> LowRank | None:
        if value.a is None:
            return value
        if name is None or (value.addend and name not in value.addend.axes):
            return None  # no factor has the axis, or the addend needs all inputs
        if value.key is not None and start is not None and value.side(name) == (True, True):
            value = value.replace(key=jax.random.fold_in(value.key, start))
        return value.on_factors(on)

    return step


def _on_axis(
    name: AxisName | None, change: Callable[[NamedArray, int], NamedArray]
) -> Callable[[NamedArray], NamedArray]:
    """Return `change(factor, axis)` as a function of a factor that may not have the axis."""
    return lambda factor: change(factor, factor.axes.index(name)) if name in factor.axes else factor


def gather_shards(name: AxisName | None, operation: AlongAxis, mesh_axes: frozenset[str]) -> Step:
    """Concatenate the shards of one axis, which is sharded over mesh axes, inside `shard_map`.

    Factors without the axis must be equal on every shard. JAX tracks the mesh axes over which an
    array varies only under `check_vma`; without it, the full weight is gathered.
    """

    def step(value: LowRank) -> LowRank | None:
        recorded = isinstance(value.base, Array) and mesh_axes <= _varies_over(value.base)
        agree = all(
            name in factor.axes or not mesh_axes & _varies_over(factor.array)
            for factor in value.named_arrays.values()
        )
        if value.a is not None and not (recorded and agree):
            return None
        return along_axis(name, operation)(value)

    return step


def _varies_over(array: Array) -> frozenset[str]:
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)  # the name of `vma` in other versions of JAX
    return frozenset(getattr(kind, "vma", ()) or getattr(manual, "varying", ()))


def select_entries(name: AxisName, operation: AlongAxis, new: tuple[AxisName, ...]) -> Step:
    """Select entries along a stack axis, by an operation that puts the new axes first."""
    on = factor_entries(name, operation, new)

    def step(value: LowRank) -> LowRank | None:
        is_stack = value.a is None or value.side(name) == (True, True)
        return value.on_factors(on) if is_stack else None

    return step


def factor_entries(
    name: AxisName, operation: AlongAxis, new: tuple[AxisName, ...]
) -> Callable[[NamedArray], NamedArray]:
    """Return the change of one factor by `select_entries`."""

    def change(factor: NamedArray, axis: int) -> NamedArray:
        rest = tuple(other for other in factor.axes if other != name)
        return NamedArray(operation(factor.array, axis), (*new, *rest))

    return _on_axis(name, change)


# -----------------------------------------------------------------------------------------------
# Values
# -----------------------------------------------------------------------------------------------


def map_factors(operation: Callable[[Array, tuple[AxisName, ...]], Array]) -> Step:
    """Apply `operation(array, axes)`, which preserves the axes, to every factor."""
    on = lambda factor: NamedArray(operation(factor.array, factor.axes), factor.axes)  # noqa: E731
    return lambda value: value.on_factors(on)


def multiply(by: Callable[[], NamedArray]) -> Step:
    """Multiply by an array that varies along axes of one factor only."""

    def step(value: LowRank) -> LowRank | None:
        if value.addend is not None:
            return None  # the multiplication does not apply to the addend
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
    """Multiply by a constant of the trace."""
    return lambda value: value.replace(scale=value.scale * factor) if value.addend is None else None


def add_to_base(value: LowRank) -> LowRank | None:
    """Add an array to W0; not possible with a gain, which would multiply it."""
    return value if value.gain is None and value.addend is None else None
