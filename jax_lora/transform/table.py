"""The table of rules: how every primitive uses a weight.

    move            the result is still a weight        structural.py
    read, compute   the weight is contracted            dot_general.py, lookup_and_conv.py
    open, rebuild   the equation has sub-jaxprs         programs.py, control_flow.py

For a primitive without a rule, the full weight is materialized.
"""

from __future__ import annotations

from jax_lora.transform import control_flow, dot_general, lookup_and_conv, programs, structural
from jax_lora.transform.rules import Rule

_UNCHANGED = Rule(move=structural.unchanged, each=True, elementwise=True)
_REMAT = Rule(open=programs.open_remat, rebuild=control_flow.remat)
_JIT = Rule(open=programs.open_call, rebuild=control_flow.jit)
_CALL = Rule(open=programs.open_call, rebuild=control_flow.call)
# The equation is not rebuilt, so that the custom derivative stays in force.
_CUSTOM_DERIVATIVE = Rule(open=programs.open_call)
_RAGGED_DOT = Rule(read=lookup_and_conv.read_ragged_dot, compute=lookup_and_conv.ragged_dot)

RULES: dict[str, Rule] = {
    # Same elements and axes.
    "copy": _UNCHANGED,
    "copy_p": _UNCHANGED,
    "name": _UNCHANGED,
    "device_put": _UNCHANGED,
    "optimization_barrier": _UNCHANGED,
    "pvary": _UNCHANGED,
    "pcast": _UNCHANGED,
    "stop_gradient": Rule(move=structural.stop_gradient, elementwise=True),
    "convert_element_type": Rule(move=structural.convert, elementwise=True),
    "sharding_constraint": Rule(move=structural.constrain_sharding),
    # Axes.
    "transpose": Rule(move=structural.transpose),
    "squeeze": Rule(move=structural.squeeze),
    "reshape": Rule(move=structural.reshape),
    "broadcast_in_dim": Rule(move=structural.expand),
    "slice": Rule(move=structural.slice_axes),
    "dynamic_slice": Rule(move=structural.dynamic_slice),
    "split": Rule(move=structural.split),
    "unstack": Rule(move=structural.unstack),
    "rev": Rule(move=structural.reverse),
    "all_gather": Rule(move=structural.all_gather),
    # Values.
    "neg": Rule(move=structural.negate, elementwise=True),
    "mul": Rule(move=structural.multiply),
    "div": Rule(move=structural.multiply),
    "add": Rule(move=structural.add),
    "sub": Rule(move=structural.add),
    # Contractions.
    "dot_general": Rule(read=dot_general.read_dot_general, compute=dot_general.dot_general),
    "gather": Rule(
        move=structural.gather_entries,
        read=lookup_and_conv.read_lookup,
        compute=lookup_and_conv.lookup,
    ),
    "ragged_dot": _RAGGED_DOT,
    "ragged_dot_general": _RAGGED_DOT,
    "conv_general_dilated": Rule(
        read=lookup_and_conv.read_convolution, compute=lookup_and_conv.convolution
    ),
    # Sub-jaxprs.
    "jit": _JIT,
    "pjit": _JIT,
    "checkpoint": _REMAT,
    "remat": _REMAT,
    "remat2": _REMAT,
    "closed_call": _CALL,
    "core_call": _CALL,
    "custom_jvp_call": _CUSTOM_DERIVATIVE,
    "custom_vjp_call": _CUSTOM_DERIVATIVE,
    "custom_vjp_call_jaxpr": _CUSTOM_DERIVATIVE,
    "scan": Rule(open=programs.open_scan, rebuild=control_flow.scan),
    "while": Rule(open=programs.open_while, rebuild=control_flow.while_loop),
    "cond": Rule(open=programs.open_cond, rebuild=control_flow.cond),
    "shard_map": Rule(open=programs.open_shard_map, rebuild=control_flow.shard_map),
}
