"""The rule for dot_general: every matrix product, einsum and DenseGeneral.

Contractions that read the same data arrive together, so that they can share their thin products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora import lowrank, meeting
from jax_lora.labels import RANK, Label
from jax_lora.lowrank import LowRank
from jax_lora.meeting import Meeting
from jax_lora.transform import forms, merged
from jax_lora.transform.interpreter import Interpreter, Value, bind, is_lowrank, shared_rule
from jax_lora.transform.sites import Site

Array = jax.Array


@shared_rule("dot_general")
def _dot_general(
    interpreter: Interpreter, eqns: Sequence[Any], inputs: Sequence[list[Value]]
) -> list[list[Value] | None]:
    """Contract one x with one or several values; None where there is no low-rank way."""
    contractions = [_read(interpreter, eqn, each) for eqn, each in zip(eqns, inputs, strict=True)]
    outputs: list[list[Value] | None] = [None] * len(eqns)
    for form, compute in _FORMS.items():
        those = [i for i, each in enumerate(contractions) if each and each.choice.form == form]
        together = [each for i in those if (each := contractions[i])]
        results = compute(together) if together else []
        for index, each, result in zip(those, together, results, strict=True):
            outputs[index] = [lowrank.biased(each.value, result, each.meeting.out_labels)]
        for each in together:
            interpreter.settings.note(_site(interpreter, each, together))
    return outputs


@dataclasses.dataclass(frozen=True)
class _Contraction:
    """One value that meets x, and how."""

    eqn: Any
    value: LowRank
    x: Array
    meeting: Meeting
    gain_first: bool  # whether the gain is applied to x, not to the result
    product: merged.Product | None
    sizes: forms.Sizes
    choice: forms.Choice


def _read(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> _Contraction | None:
    lhs, rhs = inputs
    if is_lowrank(lhs) == is_lowrank(rhs):
        return None
    weight_first = is_lowrank(lhs)
    value, x = (lhs, rhs) if weight_first else (rhs, lhs)
    if not all(jnp.issubdtype(each.dtype, jnp.floating) for each in (x, value)):
        return None
    how = _meeting(eqn, value, x, weight_first)
    if how is None:
        return None
    gain_first = not set(value.gain_labels) <= set(how.out_labels)
    if gain_first and not set(value.gain_labels) <= set(how.x_labels):
        return None  # the gain varies along an axis that is summed away and one that is not
    if value.bias is not None:
        met = set(how.x_labels) & set(value.w_labels) - set(how.out_labels)
        if not lowrank.sums_all_inputs(value, met):
            return None
    product, sizes = merged.Product.of(eqn, weight_first), _sizes(how, value, x)
    choice = forms.choose(interpreter.settings.form, sizes, jax.default_backend())
    if product is None:
        choice = forms.Choice(forms.FACTORED, "this JAX has a dot_general with unknown options")
    return _Contraction(eqn, interpreter.fresh(value), x, how, gain_first, product, sizes, choice)


def _meeting(eqn: Any, value: LowRank, x: Array, weight_first: bool) -> Meeting | None:
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    met = zip((*contract_l, *batch_l), (*contract_r, *batch_r), strict=True)
    pairs = [(left, right) if weight_first else (right, left) for left, right in met]
    w_labels, x_labels = _meeting_labels(value, x.ndim, pairs)
    batch = [w_labels[axis] for axis in (batch_l if weight_first else batch_r)]
    gone = {w_labels[axis] for axis, _ in pairs}
    free_w = [label for label in w_labels if label not in gone]
    free_x = [label for label in x_labels if label not in gone]
    out_labels = [*batch, *(free_w if weight_first else free_x)]
    out_labels += free_x if weight_first else free_w
    out = eqn.outvars[0].aval
    return meeting.meet(
        value,
        x,
        x_labels,
        out_labels,
        out.shape,
        dtype=out.dtype,
        precision=eqn.params.get("precision"),
        x_first=not weight_first,
    )


def _meeting_labels(
    value: LowRank, x_ndim: int, pairs: list[tuple[int, int]]
) -> tuple[list[Label], list[Label]]:
    """Label x's axes: the weight's label where they meet, one of its own elsewhere."""
    w_labels = [
        ("unit", axis) if label is None else label for axis, label in enumerate(value.w_labels)
    ]
    meets = {x_axis: w_labels[w_axis] for w_axis, x_axis in pairs}
    return w_labels, [meets.get(axis, ("x", axis)) for axis in range(x_ndim)]


def _sizes(how: Meeting, value: LowRank, x: Array) -> forms.Sizes:
    met = {
        label: size
        for label, size in zip(how.x_labels, x.shape, strict=True)
        if label in value.w_labels
    }
    summed = math.prod(size for label, size in met.items() if label not in how.out_labels)
    stacked = math.prod(size for label, size in met.items() if label in how.out_labels)
    return forms.Sizes(
        tokens=x.size // max(summed * stacked, 1),
        inputs=summed,
        outputs=math.prod(value.shape) // max(summed * stacked, 1),
        rank=value.a.shape[value.a_labels.index(RANK)],
        x_dtype=x.dtype,
        w_dtype=value.dtype,
        precision=how.precision,
        dropout=value.key is not None,
    )


# -----------------------------------------------------------------------------------------------
# The two forms
# -----------------------------------------------------------------------------------------------


def _factored(those: Sequence[_Contraction]) -> list[Array]:
    """Compute x · W0 + scale * (x · a) · b."""
    if any(each.value.key is not None for each in those):
        return [_with_dropout(each) for each in those]
    results = []
    for group in _of_same_data(those):
        x = _data(group[0])
        bases = [_base(each, x) for each in group]
        factors = [(each.value.a, each.value.b) for each in group]
        added = meeting.add([each.meeting for each in group], x, factors)
        results += map(_joined, group, bases, added)
    return results


def _with_dropout(each: _Contraction) -> Array:
    """Compute the factored form where the factors see other data than W0 does."""
    value, how = each.value, each.meeting
    seen = lowrank.dropped(value, each.x)
    base = _base(each, each.x)
    factors = [(value.a, value.b)]
    if not each.gain_first:
        (added,) = meeting.add([how], seen, factors)
        again = None if value.gain is None else _base(each, seen)
        return lowrank.joined(value, base, added, how.out_labels, again)
    (added,) = meeting.add([how], lowrank.gained(value, seen, how.x_labels), factors)
    return base + _base(each, lowrank.gained(value, seen, how.x_labels, less=1.0)) + added


def _merged(those: Sequence[_Contraction]) -> list[Array]:
    """Compute x · (W0 + scale * a · b)."""
    results = []
    for group in _of_same_data(those):
        members = [
            merged.Member(each.product, each.meeting, each.value.w_labels)
            for each in group
            if each.product is not None
        ]
        weights = tuple((each.value.w, each.value.a, each.value.b) for each in group)
        products = merged.multiply(members, _data(group[0]), weights)
        results += map(_gained, group, products)
    return results


def _of_same_data(those: Sequence[_Contraction]) -> list[Sequence[_Contraction]]:
    """Split off, in order, what is contracted with data of its own: x times its gain."""
    if any(each.gain_first for each in those):
        return [[each] for each in those]
    return [those]


def _data(each: _Contraction) -> Array:
    return lowrank.gained(each.value, each.x, each.meeting.x_labels) if each.gain_first else each.x


def _base(each: _Contraction, x: Array) -> Array:
    """Contract W0: the model's own equation."""
    operands = (x, each.value.w) if each.meeting.x_first else (each.value.w, x)
    return bind(each.eqn, *operands)[0]


def _joined(each: _Contraction, base: Array, added: Array) -> Array:
    return _gained(each, lax.add(base, added))


def _gained(each: _Contraction, result: Array) -> Array:
    if each.gain_first:
        return result  # x was multiplied
    return lowrank.gained(each.value, result, each.meeting.out_labels)


_FORMS = {forms.FACTORED: _factored, forms.MERGED: _merged}


def _site(interpreter: Interpreter, each: _Contraction, together: Sequence[_Contraction]) -> Site:
    return Site(
        path=each.value.path,
        where=interpreter.locate(each.eqn),
        operation="dot_general",
        form=each.choice.form,
        why=each.choice.why,
        tokens=each.sizes.tokens,
        inputs=each.sizes.inputs,
        outputs=each.sizes.outputs,
        rank=each.sizes.rank,
        times=interpreter.times,
        beside=tuple(other.value.path for other in together if other is not each),
    )
