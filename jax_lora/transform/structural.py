"""Structural rules: operations that move or scale a weight, after which it is still a weight.

A rule returns a `Move` per output: the names of the axes of the result, and the steps by which the
factors follow (moves.py). W0 itself goes through the operation. A rule returns None if the result
is not low-rank.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.algebra import moves
from jax_lora.algebra.base_weight import Recipe
from jax_lora.algebra.low_rank import accumulation_dtype
from jax_lora.algebra.moves import Move
from jax_lora.algebra.named_array import NamedArray
from jax_lora.algebra.named_axes import AxisName, Index, merge_names, reshape_groups, split_name
from jax_lora.transform.equations import is_literal
from jax_lora.transform.rules import Operand

Moves = list[Move] | None


def unchanged(weight: Operand) -> Moves:
    """`copy`, `name`, `optimization_barrier`: the factors are unchanged."""
    return [Move(weight.axes)]


def stop_gradient(weight: Operand) -> Moves:
    """`stop_gradient`: a model that freezes a weight also freezes its factors."""
    return [Move(weight.axes, (moves.map_factors(lambda array, axes: lax.stop_gradient(array)),))]


def convert(weight: Operand) -> Moves:
    """`convert_element_type`: the factors keep their type and are cast where they are used."""
    floating = jnp.issubdtype(weight.params["new_dtype"], jnp.floating)
    return [Move(weight.axes)] if floating else None


def constrain_sharding(weight: Operand) -> Moves:
    """`sharding_constraint`: the axes of factors are sharded like the axes of W0."""
    sharding = weight.params.get("sharding")
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return [Move(weight.axes)]  # only W0 is constrained; the compiler shards the factors
    by_name = dict(zip(weight.axes, sharding.spec, strict=False))

    def constrain(array: jax.Array, axes: tuple[AxisName, ...]) -> jax.Array:
        spec = jax.sharding.PartitionSpec(*(by_name.get(name) for name in axes))
        named = jax.sharding.NamedSharding(sharding.mesh, spec)
        return lax.with_sharding_constraint(array, named)

    return [Move(weight.axes, (moves.map_factors(constrain),))]


def transpose(weight: Operand) -> Moves:
    """`transpose`: the factors are unchanged."""
    return [Move(tuple(weight.axes[axis] for axis in weight.params["permutation"]))]


def squeeze(weight: Operand) -> Moves:
    """`squeeze`: remove axes of size 1."""
    removed = [weight.axes[axis] for axis in weight.params["dimensions"]]
    squeezed = {axis % len(weight.axes) for axis in weight.params["dimensions"]}
    kept = tuple(name for axis, name in enumerate(weight.axes) if axis not in squeezed)
    return [Move(kept, (moves.drop(removed),))]


def reshape(weight: Operand) -> Moves:
    """`reshape`: merge and split groups of axes that belong to one factor."""
    if weight.params.get("dimensions") is not None:
        return None
    shape, new_shape = weight.shape, weight.out_shape
    units = [name for name, size in zip(weight.axes, shape, strict=True) if size == 1]
    old = [axis for axis, size in enumerate(shape) if size != 1]
    new = [axis for axis, size in enumerate(new_shape) if size != 1]
    groups = reshape_groups([shape[axis] for axis in old], [new_shape[axis] for axis in new])
    if groups is None:
        return None
    axes: list[AxisName | None] = [None] * len(new_shape)
    steps = [moves.drop(units)]
    for before, after in groups:
        names = tuple(weight.axes[old[axis]] for axis in before)
        sizes = tuple(new_shape[new[axis]] for axis in after)
        renamed = split_name(merge_names(names), sizes)
        steps.append(moves.regroup(names, renamed, sizes))
        for axis, name in zip(after, renamed, strict=True):
            axes[new[axis]] = name
    return [Move(tuple(axes), tuple(steps))]


def expand(weight: Operand) -> Moves:
    """`broadcast_in_dim`: only new axes of size 1, which do not repeat the weight."""
    if math.prod(weight.out_shape) != math.prod(weight.shape):
        return None
    axes: list[AxisName | None] = [None] * len(weight.out_shape)
    for axis, name in zip(weight.params["broadcast_dimensions"], weight.axes, strict=True):
        axes[axis] = name
    return [Move(tuple(axes))]


def slice_axes(weight: Operand) -> Moves:
    """`slice`: slice the factors along the same axes."""
    params = weight.params
    strides = params["strides"] or (1,) * len(weight.axes)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    steps = [
        _slice(weight.axes[axis], start, limit, stride)
        for axis, (start, limit, stride) in enumerate(bounds)
        if (start, limit, stride) != (0, weight.shape[axis], 1)
    ]
    return [Move(weight.axes, tuple(steps))]


def _slice(name: AxisName | None, start: int, limit: int, stride: int = 1) -> moves.Step:
    cut = lambda array, axis: lax.slice_in_dim(array, start, limit, stride, axis)  # noqa: E731
    return moves.along_axis(name, cut, start)


def dynamic_slice(weight: Operand) -> Moves:
    """`dynamic_slice`: slice the factors along the same axes, from the same starts."""
    if weight.position != 0:
        return None
    sizes = weight.params["slice_sizes"]

    def step(axis: int) -> moves.Step:
        start: Any = None if weight.values is None else weight.value(1 + axis)
        # The primitive clamps a negative start, and does not count it from the end.
        cut = lambda array, place: lax.dynamic_slice_in_dim(  # noqa: E731
            array, start, sizes[axis], place, allow_negative_indices=False
        )
        return moves.along_axis(weight.axes[axis], cut, start)

    cut_axes = [axis for axis, size in enumerate(sizes) if size != weight.shape[axis]]
    return [Move(weight.axes, tuple(map(step, cut_axes)))]


def split(weight: Operand) -> Moves:
    """`split`: an output per slice along one axis."""
    name, sizes = weight.axes[weight.params["axis"]], weight.params["sizes"]
    ends = itertools.accumulate(sizes)
    slices = (_slice(name, end - size, end) for end, size in zip(ends, sizes, strict=True))
    return [Move(weight.axes, (each,)) for each in slices]


def unstack(weight: Operand) -> Moves:
    """`unstack`: an output per entry along one axis, as iteration over an array returns them."""
    axis = weight.params["axis"]
    name = weight.axes[axis]
    rest = (*weight.axes[:axis], *weight.axes[axis + 1 :])
    entries = (_slice(name, index, index + 1) for index in range(weight.shape[axis]))
    return [Move(rest, (entry, moves.drop((name,)))) for entry in entries]


def reverse(weight: Operand) -> Moves:
    """`rev`: reverse the factors along the same axes."""
    flip = lambda array, axis: lax.rev(array, [axis])  # noqa: E731
    names = [weight.axes[axis] for axis in weight.params["dimensions"]]
    return [Move(weight.axes, tuple(moves.along_axis(name, flip) for name in names))]


def gather_entries(weight: Operand) -> Moves:
    """`gather` of whole entries along one stack axis: some layers or experts."""
    axis = looked_up_axis(weight)
    if axis is None:
        return None
    name = weight.axes[axis]
    new = [Index(name, i) for i in range(weight.eqn.invars[1].aval.ndim - 1)]
    numbers = weight.params["dimension_numbers"]
    collapsed = numbers.collapsed_slice_dims
    # A looked-up axis that is not collapsed has size 1 and belongs to no factor.
    rest = iter(
        None if i == axis else other for i, other in enumerate(weight.axes) if i not in collapsed
    )
    index_names, out = iter(new), range(len(weight.out_shape))
    axes = tuple(next(rest) if i in numbers.offset_dims else next(index_names) for i in out)
    entries = lambda array, place: gather_from(weight, array, place, weight.value(1))  # noqa: E731
    return [Move(axes, (moves.select_entries(name, entries, tuple(new)),))]


def looked_up_axis(weight: Operand) -> int | None:
    """Return the axis along which a gather selects whole entries, or None for another gather."""
    if weight.position != 0:
        return None
    numbers = weight.params["dimension_numbers"]
    sizes = weight.params["slice_sizes"]
    cut = [axis for axis in numbers.start_index_map if sizes[axis] != weight.shape[axis]]
    cut = cut or list(numbers.start_index_map[:1])  # a table of one row
    others_clamped = len(numbers.start_index_map) == 1 or (
        weight.params["mode"] == lax.GatherScatterMode.CLIP  # clips the index of a full axis to 0
    )
    if len(cut) != 1 or not others_clamped or getattr(numbers, "operand_batching_dims", ()):
        return None
    whole = tuple(1 if axis == cut[0] else size for axis, size in enumerate(weight.shape))
    plain = tuple(sizes) == whole and numbers.collapsed_slice_dims in ((), (cut[0],))
    return cut[0] if plain and weight.axes[cut[0]] is not None else None


def gather_from(weight: Operand, factor: jax.Array, axis: int, indices: jax.Array) -> jax.Array:
    """Select the entries of a factor that the equation selects of W0: (*ids, *rest)."""
    entries = jnp.moveaxis(factor, axis, 0)
    ids = indices.ndim - 1
    column = weight.params["dimension_numbers"].start_index_map.index(looked_up_axis(weight))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(ids, ids + entries.ndim - 1)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    return lax.gather(
        entries,
        indices[..., column : column + 1],
        numbers,
        (1, *entries.shape[1:]),
        mode=weight.params["mode"],
        fill_value=0,
    )


def rows_of_codes(weight: Operand, base: Any) -> jax.Array | None:
    """Look up rows of a table that is a recipe, and compute only these rows.

    The result is None for other equations, base weights and recipes.
    """
    if weight.eqn.primitive.name != "gather" or not isinstance(base, Recipe) or base.ndim != 2:
        return None
    numbers, ids = weight.params["dimension_numbers"], weight.value(1)
    whole_rows = numbers.offset_dims == (ids.ndim - 1,) and numbers.collapsed_slice_dims == (0,)
    if looked_up_axis(weight) != 0 or not whole_rows:
        return None
    take = lambda array: gather_from(weight, array, 0, ids)  # noqa: E731
    rows = base.entries(take)  # (*ids, columns)
    if rows is None or weight.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return rows
    # A row out of range is a fill value, not what codes of zero stand for.
    known = jnp.broadcast_to(take(jnp.ones((base.shape[0], 1), bool)), rows.shape)
    fill = weight.params["fill_value"]
    return jnp.where(known, rows, jnp.full_like(rows, jnp.nan if fill is None else fill))


def all_gather(weight: Operand) -> Moves:
    """`all_gather` of the shards of one axis, inside `shard_map`."""
    params = weight.params
    if not params.get("tiled") or params.get("axis_index_groups") is not None:
        return None
    mesh_axes = params["axis_name"]
    mesh_axes = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
    gather = lambda array, axis: lax.all_gather(array, mesh_axes, axis=axis, tiled=True)  # noqa: E731
    name = weight.axes[params["all_gather_dimension"]]
    return [Move(weight.axes, (moves.gather_shards(name, gather, frozenset(mesh_axes)),))]


def negate(weight: Operand) -> Moves:
    """`neg`: negate the scale."""
    return [Move(weight.axes, (moves.scale(-1.0),))]


def multiply(weight: Operand) -> Moves:
    """`mul` and `div` by a constant, or by an array that varies along axes of one factor."""
    inverse, other = weight.eqn.primitive.name == "div", 1 - weight.position
    if weight.out_shape != weight.shape or (inverse and weight.position == 1):
        return None  # the operation broadcasts the weight, or the weight is the divisor
    var = weight.eqn.invars[other]
    if is_literal(var) and jnp.ndim(var.val) == 0:
        constant = float(var.val)
        factor = (1.0 / constant if constant else math.inf) if inverse else constant
        if math.isfinite(factor):
            return [Move(weight.axes, (moves.scale(factor),))]
    shape = jnp.shape(var.val) if is_literal(var) else var.aval.shape
    varying = [axis for axis, size in enumerate(shape) if size != 1]

    def by() -> NamedArray:
        array = jnp.asarray(weight.value(other))
        units = [axis for axis in range(array.ndim) if axis not in varying]
        wide = lax.squeeze(array, units).astype(accumulation_dtype(array.dtype))
        names = tuple(weight.axes[axis] for axis in varying)
        return NamedArray(1.0 / wide if inverse else wide, names)

    return [Move(weight.axes, (moves.multiply(by),))]


def add(weight: Operand) -> Moves:
    """`add` and `sub`: the other array changes W0 only."""
    if weight.out_shape != weight.shape:
        return None
    subtracted = weight.eqn.primitive.name == "sub" and weight.position == 1
    steps = (moves.add_to_base, *([moves.scale(-1.0)] if subtracted else []))
    return [Move(weight.axes, steps, adds=True)]
