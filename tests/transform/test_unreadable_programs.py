"""On a JAX with other equation parameters, weights are materialized, with a warning."""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_lora as jl
from jax_lora.errors import MaterializeWarning
from jax_lora.transform.table import RULES
from tests.lora_cases import adapt, assert_close, merged_tree, random_tree

X = random_tree((2, 6), 2)
MESH = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def layer(w, x):
    return jnp.tanh(x @ w)


PROGRAMS = {
    "jit": lambda p, x: jax.jit(layer)(p["w"], x),
    "remat2": lambda p, x: jax.checkpoint(layer)(p["w"], x),
    "scan": lambda p, x: lax.scan(lambda h, _: (layer(p["w"], h), h), x, None, length=3),
    "while": lambda p, x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, layer(p["w"], s[1])), (0, x)
    )[1],
    "cond": lambda p, x: lax.cond(x[0, 0] > 0, layer, lambda w, x: jnp.sin(x @ w), p["w"], x),
    "shard_map": lambda p, x: jax.shard_map(
        layer, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data")
    )(p["w"], x),
}  # fmt: skip
PARAMETERS = {
    "jit": ("jaxpr",),
    "remat2": ("jaxpr", "prevent_cse", "policy"),
    "scan": ("jaxpr", "length", "reverse", "unroll"),
    "while": ("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"),
    "cond": ("branches",),
    "shard_map": ("jaxpr", "mesh", "in_specs", "out_specs", "check_vma"),
}
CASES = [(name, parameter) for name, each in PARAMETERS.items() for parameter in each]


def renamed(eqn, parameter):
    """The equation as a JAX that calls one parameter by another name would show it."""
    params = dict(eqn.params)
    params[f"new_{parameter}"] = params.pop(parameter)
    names = ("primitive", "invars", "outvars", "effects", "source_info")
    return types.SimpleNamespace(params=params, **{name: getattr(eqn, name) for name in names})


def primitive_name(name):
    """What this JAX calls the program: its own name, or one that came before or after."""
    eqns = jax.make_jaxpr(PROGRAMS[name])({"w": jnp.ones((6, 6))}, X).eqns
    aliases = {"jit": ("jit", "pjit"), "remat2": ("checkpoint", "remat", "remat2")}
    (found,) = {eqn.primitive.name for eqn in eqns} & set(aliases.get(name, (name,)))
    return found


@functools.cache
def adapted():
    tree = {"w": random_tree((6, 6))}
    return tree, adapt(lambda p, x: x @ p["w"], tree, X)


def assert_forms_the_weight(name):
    tree, adapter = adapted()
    ours = lambda each: jl.lora_apply(PROGRAMS[name])(jl.combine(tree, each), X)  # noqa: E731
    theirs = lambda each: PROGRAMS[name](merged_tree(tree, each), X)  # noqa: E731
    both = jax.jit(lambda each: [jax.jvp(side, (each,), (each,)) for side in (ours, theirs)])
    with pytest.warns(MaterializeWarning, match=rf"w at .*{__file__}") as caught:
        got, want = both(adapter)
    assert len(caught) == 1
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_are_readable_on_this_jax(name):
    tree, adapter = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(jl.lora_apply(PROGRAMS[name]))(jl.combine(tree, adapter), X)


def unreadable(monkeypatch, name, parameter):
    """A JAX that calls one parameter of a program by another name; what it was asked to open."""
    primitive = primitive_name(name)
    rule = RULES[primitive]
    seen = []

    def open_renamed(eqn):
        seen.append(parameter)
        return rule.open(renamed(eqn, parameter))

    monkeypatch.setitem(RULES, primitive, dataclasses.replace(rule, open=open_renamed))
    return seen


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_a_parameter_of_another_name_forms_the_weight(name, parameter, monkeypatch):
    seen = unreadable(monkeypatch, name, parameter)
    assert_forms_the_weight(name)
    assert seen


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_another_name_forms_the_weight(name, monkeypatch):
    monkeypatch.delitem(RULES, primitive_name(name))
    assert_forms_the_weight(name)


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_find_kernels_names_a_kernel_in_a_program_that_it_cannot_read(name, parameter, monkeypatch):
    unreadable(monkeypatch, name, parameter)
    kernels = jl.find_kernels(PROGRAMS[name], adapted()[0], X)
    assert not kernels
    assert f"{primitive_name(name)} has no low-rank rule at {__file__}" in kernels.skipped["w"]


def _called_back(w, x):
    return jax.pure_callback(jnp.matmul, jax.ShapeDtypeStruct((2, 4), x.dtype), x, w)


def _linear_call(w, x):
    return jax.custom_derivatives.linear_call(lambda w, x: x @ w, lambda w, g: g @ w.T, w, x)


@pytest.mark.parametrize(
    "multiply", [_called_back, _linear_call, lambda w, x: jnp.linalg.solve(w, x.T).T]
)
def test_a_target_that_an_opaque_operation_multiplies_is_named_in_a_warning(multiply):
    params = {"w": jnp.eye(4), "mid": jnp.eye(4), "head": jnp.eye(4)}
    fn = lambda p, x: multiply(p["w"], x) @ p["mid"] @ p["head"]  # noqa: E731
    kernels = jl.find_kernels(fn, params, jnp.ones((2, 4)))
    with pytest.warns(UserWarning, match="w"):
        adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2), kernels=kernels)
    assert [*adapter.pairs] == ["mid"]


def test_a_call_without_a_program_has_nothing_to_open():
    assert RULES["closed_call"].open(types.SimpleNamespace(params={})) is None
