"""The table of rules: what every primitive does with a weight, one entry each.

    move            its axes move, and it stays a weight    structural.py
    read, compute   it is used up, in names and on arrays   dot_general.py, lookup_and_conv.py
    open, rebuild   programs are opened and built again     programs.py, control_flow.py

A primitive that is not here has no rule: the full weight is materialized for it.
"""

from __future__ import annotations

from jax_lora.transform import control_flow, dot_general, lookup_and_conv, programs, structural
from jax_lora.transform.rules import Rule

_UNCHANGED = Rule(move=structural.unchanged, each=True, elementwise=True)
_REMAT = Rule(open=programs.open_remat, rebuild=control_flow.remat)
_JIT = Rule(open=programs.open_jit, rebuild=control_flow.jit)
_CALL = Rule(open=programs.open_call, rebuild=control_flow.call)
_OWN_DERIVATIVE = Rule(
    open=programs.open_call
)  # which must stay in force, so it is never opened up
_RAGGED_DOT = Rule(read=lookup_and_conv.read_ragged_dot, compute=lookup_and_conv.ragged_dot)

RULES: dict[str, Rule] = {
    # The same elements.
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
    # Other axes.
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
    # Other values.
    "neg": Rule(move=structural.negate, elementwise=True),
    "mul": Rule(move=structural.multiply),
    "div": Rule(move=structural.divide),
    "add": Rule(move=structural.add),
    "sub": Rule(move=structural.add),
    # Uses.
    "dot_general": Rule(read=dot_general.read_dot_general, compute=dot_general.dot_general),
    "gather": Rule(
        move=structural.choose,
        read=lookup_and_conv.read_lookup,
        compute=lookup_and_conv.lookup,
    ),
    "ragged_dot": _RAGGED_DOT,
    "ragged_dot_general": _RAGGED_DOT,
    "conv_general_dilated": Rule(
        read=lookup_and_conv.read_convolution, compute=lookup_and_conv.convolution
    ),
    # Programs.
    "jit": _JIT,
    "pjit": _JIT,
    "checkpoint": _REMAT,
    "remat": _REMAT,
    "remat2": _REMAT,
    "closed_call": _CALL,
    "core_call": _CALL,
    "custom_jvp_call": _OWN_DERIVATIVE,
    "custom_vjp_call": _OWN_DERIVATIVE,
    "custom_vjp_call_jaxpr": _OWN_DERIVATIVE,
    "scan": Rule(open=programs.open_scan, rebuild=control_flow.scan),
    "while": Rule(open=programs.open_while, rebuild=control_flow.while_loop),
    "cond": Rule(open=programs.open_cond, rebuild=control_flow.cond),
    "shard_map": Rule(open=programs.open_shard_map, rebuild=control_flow.shard_map),
}
