"""Varying: along which axes of a mesh the data that a weight meets differ from shard to shard.

Inside `shard_map` every shard runs the same program. Shards whose data differ should drop inputs
of their own, and shards that hold the same data must drop the same ones, or what they compute from
them would no longer be the same. The program says which is which: data differ along the axes that
they come in sharded by, a sum or a gather over an axis makes them the same again. JAX keeps such a
record of its own only under `check_vma`, and there a kernel sharded by its outputs marks the data
that it meets as differing.

In doubt data count as the same: shards then drop alike, which is correct for any data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core as jex_core

from jax_lora.transform.interpreter import STRUCTURAL, opened
from jax_lora.transform.layout import scan_layout

Axes = frozenset[str]
NO_AXES: Axes = frozenset()

# What leaves different data on every shard. All else that runs over a mesh axis - sums, maxima,
# gathers - counts as making them the same along it.
_MADE_DIFFERENT = frozenset(
    "axis_index ppermute all_to_all ragged_all_to_all reduce_scatter".split()
)
_MEETINGS = frozenset("dot_general ragged_dot ragged_dot_general conv_general_dilated".split())


def axes_of(spec: Any) -> Axes:
    """Return the mesh axes that a `PartitionSpec` names."""
    return frozenset(name for entry in spec for name in _names(entry))


def axes_met(jaxpr: Any, inputs: Sequence[Axes], asked: Sequence[bool]) -> list[Axes]:
    """Return, per weight, the mesh axes along which all the data that it meets differ.

    Args:
      jaxpr: The open jaxpr that every shard runs.
      inputs: The axes along which each input of it differs.
      asked: Which inputs are weights to ask about.

    Returns:
      The axes of each input; none for an input that was not asked about, or meets nothing.
    """
    if not any(asked):
        return [NO_AXES] * len(inputs)
    known = [
        _Known(axes, frozenset({index}) if is_weight else frozenset())
        for index, (axes, is_weight) in enumerate(zip(inputs, asked, strict=True))
    ]
    met: dict[int, Axes] = {}
    _walk(jaxpr, known, met)
    return [met.get(index, NO_AXES) for index in range(len(inputs))]


@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known of a variable: the axes along which it differs, and which weights it is."""

    axes: Axes = NO_AXES
    weights: frozenset[int] = frozenset()


_Met = dict[int, Axes]
_UNKNOWN = _Known()


def _join(values: Sequence[_Known]) -> _Known:
    return _Known(
        NO_AXES.union(*(value.axes for value in values)),
        frozenset().union(*(value.weights for value in values)),
    )


def _walk(jaxpr: Any, inputs: Sequence[_Known], met: _Met) -> list[_Known]:
    known: dict[Any, _Known] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(var: Any) -> _Known:
        return _UNKNOWN if isinstance(var, jex_core.Literal) else known.get(var, _UNKNOWN)

    for eqn in jaxpr.eqns:
        handler = _HANDLERS.get(eqn.primitive.name, _operation)
        outputs = handler(eqn, [read(var) for var in eqn.invars], met)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _names(entry: Any) -> tuple[str, ...]:
    entries = entry if isinstance(entry, (tuple, list, frozenset, set)) else (entry,)
    return tuple(name for name in entries if isinstance(name, str))


# -----------------------------------------------------------------------------------------------
# Plain operations
# -----------------------------------------------------------------------------------------------


def _operation(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    count = len(eqn.outvars)
    # An operation on several arrays, such as a sum of a tree, does each for itself.
    outputs = list(values) if len(values) == count else [_join(values)] * count
    if eqn.primitive.name in STRUCTURAL:
        return outputs
    return [_Known(_after(eqn, output.axes)) for output in outputs]


def _after(eqn: Any, axes: Axes) -> Axes:
    """Return the axes along which data differ after an operation that may run over some."""
    if eqn.params.get("axis_index_groups") is not None:
        return axes  # it makes them the same within each group only
    over = frozenset(_names(eqn.params.get("axes", eqn.params.get("axis_name"))))
    made_different = eqn.primitive.name.removesuffix("_start") in _MADE_DIFFERENT
    return axes | over if made_different else axes - over


def _meeting(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    for index, value in enumerate(values):
        data = _join([other for i, other in enumerate(values) if i != index]).axes
        _meet(met, value.weights, data)
    return [_Known(_join(values).axes)] * len(eqn.outvars)


def _meet(met: _Met, weights: Iterable[int], data: Axes) -> None:
    for weight in weights:
        met[weight] = met.get(weight, data) & data


def _gather(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    numbers = eqn.params["dimension_numbers"]
    kept = eqn.invars[0].aval.ndim - len(numbers.collapsed_slice_dims)
    # Rows of a table are data; some matrices of a stack are still weights.
    weights = values[0].weights if kept > 1 else frozenset()
    return [_Known(_join(values).axes, weights)]


# -----------------------------------------------------------------------------------------------
# Operations that hold a program
# -----------------------------------------------------------------------------------------------


def _call(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    for name in ("jaxpr", "call_jaxpr"):
        jaxpr, _ = opened(eqn.params.get(name))
        if jaxpr is not None and len(jaxpr.invars) == len(values):
            return _walk(jaxpr, values, met)
    return [_UNKNOWN] * len(eqn.outvars)


def _shard_map(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    here = [axes_of(spec) for spec in eqn.params["in_specs"]]
    inputs = [
        dataclasses.replace(value, axes=value.axes | axes)
        for value, axes in zip(values, here, strict=True)
    ]
    inside: _Met = {}
    outputs = _walk(opened(eqn.params["jaxpr"])[0], inputs, inside)
    manual = frozenset(eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", ())))
    for weight, axes in inside.items():
        _meet(met, (weight,), axes - manual)  # the rest is for the inner shard_map to say
    return [dataclasses.replace(output, axes=output.axes - manual) for output in outputs]


def _scan(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    layout = scan_layout(eqn)
    if layout is None:
        return [_UNKNOWN] * len(eqn.outvars)
    n_consts, n_carry = layout
    consts, carry, xs = (
        list(values[:n_consts]),
        list(values[n_consts : n_consts + n_carry]),
        list(values[n_consts + n_carry :]),
    )
    body, _ = opened(eqn.params["jaxpr"])
    carry = _settled(carry, lambda carry: _walk(body, [*consts, *carry, *xs], {})[:n_carry])
    return _walk(body, [*consts, *carry, *xs], met)


def _while(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    params = eqn.params
    if not {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"} <= set(params):
        return [_UNKNOWN] * len(eqn.outvars)
    n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
    for_test, for_body = list(values[:n_test]), list(values[n_test : n_test + n_body])
    test, body = opened(params["cond_jaxpr"])[0], opened(params["body_jaxpr"])[0]
    carry = list(values[n_test + n_body :])
    carry = _settled(carry, lambda carry: _walk(body, [*for_body, *carry], {}))
    _walk(test, [*for_test, *carry], met)
    return _walk(body, [*for_body, *carry], met)


def _settled(carry: list[_Known], step: Callable[[list[_Known]], Sequence[_Known]]) -> list[_Known]:
    """Join what goes into a loop with what comes round, until nothing is added."""
    while True:
        joined = [_join(pair) for pair in zip(carry, step(carry), strict=True)]
        if joined == carry:
            return carry
        carry = joined


def _cond(eqn: Any, values: Sequence[_Known], met: _Met) -> list[_Known]:
    branches = [opened(branch)[0] for branch in eqn.params["branches"]]
    results = [_walk(branch, values[1:], met) for branch in branches]
    return [_join(outputs) for outputs in zip(*results, strict=True)]


_HANDLERS: dict[str, Callable[[Any, Sequence[_Known], _Met], list[_Known]]] = {
    "gather": _gather,
    "shard_map": _shard_map,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(_MEETINGS, _meeting),
    **dict.fromkeys(
        "jit pjit checkpoint remat remat2 closed_call core_call custom_jvp_call "
        "custom_vjp_call custom_vjp_call_jaxpr".split(),
        _call,
    ),
}
