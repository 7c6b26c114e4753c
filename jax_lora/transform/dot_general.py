"""The rule of dot_general, to which every matrix product, einsum and DenseGeneral lowers.

`read_dot_general` names the axes. `dot_general` computes contractions with the same data together,
so that they share a down-projection.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax

from jax_lora.algebra import base_weight, factored_product, merged_product
from jax_lora.algebra.factored_product import Projection
from jax_lora.algebra.low_rank import Parts, apply_dropout, times_gain
from jax_lora.algebra.merged_product import Member
from jax_lora.transform.contraction import Contraction, Result
from jax_lora.transform.rules import Operand, Use
from jax_lora.transform.strategies import FACTORED, MERGED, Choice, Sizes

if TYPE_CHECKING:
    from jax_lora.transform.evaluate import Evaluate

Array = jax.Array


def read_dot_general(weight: Operand) -> Use | None:
    """Name the axes of a contraction's operands and result."""
    contract, batch = weight.params["dimension_numbers"]
    mine, other = weight.position, 1 - weight.position
    names = [("unit", axis) if name is None else name for axis, name in enumerate(weight.axes)]
    paired = {
        x_axis: names[w_axis]
        for axes in (contract, batch)
        for w_axis, x_axis in zip(axes[mine], axes[other], strict=True)
    }
    x_ndim = len(weight.eqn.invars[other].aval.shape)
    x_names = [paired.get(axis, ("x", axis)) for axis in range(x_ndim)]
    batched = [names[axis] for axis in batch[mine]]
    free = [[name for name in each if name not in paired.values()] for each in (names, x_names)]
    out = [*batched, *free[mine], *free[1 - mine]]
    return Use(
        kind="dense",
        summed=tuple(weight.axes[axis] for axis in contract[mine]),
        batched=tuple(weight.axes[axis] for axis in batch[mine]),
        data=other,
        data_axes=tuple(x_names),
        out_axes=tuple(out),
        terms=math.prod(weight.shape[axis] for axis in contract[mine]),
    )


@dataclasses.dataclass(frozen=True)
class _Planned:
    """One contraction, and the chosen form."""

    contraction: Contraction
    plan: Projection
    gain_first: bool  # whether the gain multiplies x instead of the result
    member: Member | None  # for the merged form; None if this JAX has other options
    sizes: Sizes
    choice: Choice


def dot_general(evaluator: Evaluate, contractions: Sequence[Contraction]) -> list[Result]:
    """Contract x with one or more low-rank values; None if a contraction needs the full weight."""
    planned = [_plan(evaluator, each) for each in contractions]
    results: list[Result] = [None] * len(contractions)
    for form, compute in ((FACTORED, _factored), (MERGED, _merged)):
        group = {i: each for i, each in enumerate(planned) if each and each.choice.form == form}
        parts = compute(list(group.values()))
        for (index, each), each_parts in zip(group.items(), parts, strict=True):
            value = each.contraction.value
            results[index] = (value.replace(gain=None) if each.gain_first else value, each_parts)
            others = (other for other in group.values() if other is not each)
            evaluator.note(
                each.contraction,
                each.choice,
                tokens=each.sizes.tokens,
                inputs=each.sizes.inputs,
                outputs=each.sizes.outputs,
                beside=tuple(other.contraction.value.path for other in others),
            )
    return results


def _plan(evaluator: Evaluate, each: Contraction) -> _Planned | None:
    value, x, use = each.value, each.data, each.use
    out = each.eqn.outvars[0].aval
    gain_axes = set() if value.gain is None else {*value.gain.axes}
    gain_first = not gain_axes <= {*use.out_axes}
    if gain_first and not gain_axes <= {*use.data_axes}:
        return None  # the gain varies along both a summed axis and an output axis
    a, b = value.factors
    plan = factored_product.projection(
        value,
        x,
        use.data_axes,
        use.out_axes,
        out.shape,
        dtype=out.dtype,
        precision=each.eqn.params.get("precision"),
        x_first=use.data == 0,
        flatten=evaluator.strategy.flattens(x, a.array, b.array),
    )
    if plan is None:
        return None
    member, sizes = _member(plan, each), _sizes(plan, each)
    choice = evaluator.strategy.choose(sizes)
    if member is None:
        choice = Choice(FACTORED, "this JAX has a dot_general with unknown options")
    return _Planned(each, plan, gain_first, member, sizes, choice)


def _member(plan: Projection, each: Contraction) -> Member | None:
    """Read the parameters of a `dot_general`; None if it has unknown ones."""
    names, params = ("dimension_numbers", "preferred_element_type", "out_sharding"), each.eqn.params
    if not {*params} <= {"precision", *names}:
        return None
    return Member(plan, each.value.axes, **{name: params.get(name) for name in names})


def _sizes(plan: Projection, each: Contraction) -> Sizes:
    value, x, use = each.value, each.data, each.use
    named = zip(use.data_axes, x.shape, strict=True)
    paired = {name: size for name, size in named if name in value.axes}
    count = max(math.prod(paired.values()), 1)
    return Sizes(
        tokens=math.prod(x.shape) // count,
        inputs=math.prod(size for name, size in paired.items() if name not in use.out_axes),
        outputs=math.prod(value.shape) // count,
        x_dtype=x.dtype,
        w_dtype=value.dtype,
        precision=plan.precision,
        dropout=value.key is not None,
        stored=not isinstance(value.base, base_weight.Recipe),
    )


def _factored(those: Sequence[_Planned]) -> list[Parts]:
    """Compute x · W0 + scale * (x · a) · b."""
    if any(each.contraction.value.key is not None for each in those):
        return [_with_dropout(each) for each in those]
    results = []
    for x, group in _of_same_data(those):
        bases = [each.contraction.on_base(x) for each in group]
        factors = [each.contraction.value.factors for each in group]
        updates = factored_product.multiply([each.plan for each in group], x, factors)
        results += map(Parts, bases, updates)
    return results


def _with_dropout(each: _Planned) -> Parts:
    """Compute the factored form where dropout changes the data of the factors only."""
    value, x = each.contraction.value, each.contraction.data
    seen = apply_dropout(value, x)
    base = each.contraction.on_base(x)
    multiply = functools.partial(factored_product.multiply, [each.plan], factors=[value.factors])
    if not each.gain_first:
        (update,) = multiply(seen)
        return Parts(base, update, each.contraction.on_base_after_dropout(seen))
    axes = each.plan.x_axes
    (update,) = multiply(times_gain(value, seen, axes))
    return Parts(base + each.contraction.on_base(times_gain(value, seen, axes, less=1.0)), update)


def _merged(those: Sequence[_Planned]) -> list[Parts]:
    """Compute x · (W0 + scale * a · b)."""
    results = []
    for x, group in _of_same_data(those):
        members = [each.member for each in group if each.member is not None]
        weights = tuple(
            (base_weight.as_array(each.contraction.value.base), *each.contraction.value.factors)
            for each in group
        )
        results += map(Parts, merged_product.multiply(members, x, weights))
    return results


def _of_same_data(those: Sequence[_Planned]) -> Iterator[tuple[Array, Sequence[_Planned]]]:
    """Yield x and the contractions that share it: none does where x is multiplied by a gain."""
    if any(each.gain_first for each in those):
        for each in those:
            value, x = each.contraction.value, each.contraction.data
            yield times_gain(value, x, each.plan.x_axes) if each.gain_first else x, [each]
    elif those:
        yield those[0].contraction.data, those
