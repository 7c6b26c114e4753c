"""Every rule of the table is supported by every interpretation.

For each primitive there is a function here that applies it to a weight. `evaluate` must keep the
weight factored up to a product, `analyze` must find the kernel, and `vary` must find its data.
"""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_lora as jl
from jax_lora.transform import abstract, programs, vary
from jax_lora.transform.analyze import Analyze
from jax_lora.transform.evaluate import Evaluate
from jax_lora.transform.rules import Rule
from jax_lora.transform.table import RULES
from jax_lora.transform.vary import Vary
from tests.lora_cases import assert_close, equations, merged_tree, random_tree, randomized

MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
X, W = random_tree((4, 6), 3), random_tree((6, 6), 4)
EXPERTS, SIZES = random_tree((2, 6, 6), 5), jnp.array([1, 3])


@jax.custom_jvp
def own_jvp(x):
    return jnp.sin(x)


own_jvp.defjvps(lambda dx, _, x: dx * jnp.cos(x))


@jax.custom_vjp
def own_vjp(x):
    return jnp.sin(x)


own_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def sharded(body):
    return jax.shard_map(body, mesh=MESH, in_specs=(P("d"), P("d")), out_specs=P("d"))


# A program per primitive: w is the weight, x the data.
PROGRAMS = {
    "copy": lambda w, x: x @ jnp.array(w, copy=True),
    "name": lambda w, x: x @ checkpoint_name(w, "kernel"),
    "device_put": lambda w, x: x @ jax.device_put(w, jax.devices()[0]),
    "optimization_barrier": lambda w, x: x @ lax.optimization_barrier((w, x))[0],
    "stop_gradient": lambda w, x: x @ lax.stop_gradient(w),
    "convert_element_type": lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
    "sharding_constraint": lambda w, x: (
        x @ lax.with_sharding_constraint(w, NamedSharding(MESH, P(None, "d")))
    ),
    "transpose": lambda w, x: x @ w.T,
    "squeeze": lambda w, x: x @ lax.squeeze(lax.expand_dims(w, [0]), [0]),
    "reshape": lambda w, x: x @ w.reshape(6, 2, 3)[:, :, 0],
    "broadcast_in_dim": lambda w, x: x @ lax.squeeze(w[None], [0]),
    "slice": lambda w, x: x @ w[:, 1:4],
    "dynamic_slice": lambda w, x: x @ lax.dynamic_slice_in_dim(w, SIZES[0], 3, 1),
    "split": lambda w, x: x @ jnp.split(w, 2, axis=1)[0],
    "rev": lambda w, x: x @ w[:, ::-1],
    "all_gather": lambda w, x: sharded(
        lambda w, x: x @ lax.all_gather(w, "d", axis=0, tiled=True)
    )(w, x),
    "neg": lambda w, x: x @ -w,
    "mul": lambda w, x: x @ (w * 2.0),
    "div": lambda w, x: x @ (w / 2.0),
    "add": lambda w, x: x @ (w + 1.0),
    "sub": lambda w, x: x @ (1.0 - w),
    "dot_general": lambda w, x: x @ w,
    "gather": lambda w, x: w[jnp.array([0, 2, 1])],
    "ragged_dot_general": lambda w, x: lax.ragged_dot(x, w, SIZES),
    "conv_general_dilated": lambda w, x: lax.conv_general_dilated(
        x[None], w[None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "jit": lambda w, x: jax.jit(jnp.matmul)(x, w),
    "remat2": lambda w, x: jax.checkpoint(jnp.matmul)(x, w),
    "scan": lambda w, x: lax.scan(lambda h, _: (h @ w, None), x, None, length=2)[0],
    "while": lambda w, x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x)
    )[1],
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, jnp.matmul, lambda x, w: -(x @ w), x, w),
    "shard_map": lambda w, x: jax.shard_map(
        jnp.matmul, mesh=MESH, in_specs=(P("d"), P()), out_specs=P("d")
    )(x, w),
    "custom_jvp_call": lambda w, x: jax.jit(own_jvp)(x) @ w,
    "custom_vjp_call": lambda w, x: jax.jit(own_vjp)(x) @ w,
}  # fmt: skip
# What one primitive is called in other versions of JAX, and what only a compiler makes.
ALIASES = {
    "copy": {"copy_p"},
    "slice": {"unstack"},  # what iterating over an array traces to
    "jit": {"pjit"},
    "remat2": {"checkpoint", "remat"},
    "ragged_dot_general": {"ragged_dot"},
    "custom_vjp_call": {"custom_vjp_call_jaxpr"},
    "optimization_barrier": {"pvary", "pcast"},  # of a shard_map under check_vma: the same rule
    "jit ": {"closed_call", "core_call"},  # plain calls, which nothing traces to today
}
# What is looked into, but never evaluated inside: the derivative by hand must stay in force.
LOOKED_INTO = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def weight_of(name):
    return EXPERTS if name.startswith("ragged") else W


def test_every_entry_has_a_program():
    named = {*PROGRAMS}.union(*ALIASES.values())
    assert named == {*RULES}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_of_an_entry_contains_its_primitive(name):
    jaxpr = jax.make_jaxpr(PROGRAMS[name])(weight_of(name), X).jaxpr
    found = {eqn.primitive.name for eqn in equations(jaxpr)}
    assert found & {name, *ALIASES.get(name, ())}


def test_kernels_that_are_iterated_over_are_carried_whatever_jax_calls_it():
    fn = lambda p, x: sum(jnp.tanh(x @ kernel) for kernel in p["w"])  # noqa: E731
    tree = {"w": EXPERTS}
    kernels = jl.find_kernels(fn, tree, X)
    assert kernels["w"].stack_axes == (0,)
    config = jl.LoraConfig(rank=2, targets="w")
    adapter = randomized(jl.lora_init(jax.random.key(0), tree, config, kernels=kernels))
    got = jl.lora_apply(fn, on_materialize="error")(jl.combine(tree, adapter), X)
    assert_close(got, fn(merged_tree(tree, adapter), X), 1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_evaluate_and_analyze_agree_on_every_entry(name):
    fn = lambda p, x: jnp.tanh(PROGRAMS[name](p["w"], x))  # noqa: E731
    tree = {"w": weight_of(name)}
    kernels = jl.find_kernels(fn, tree, X)
    assert list(kernels) == ["w"] and not kernels.skipped
    config = jl.LoraConfig(rank=2, targets="w")
    adapter = randomized(jl.lora_init(jax.random.key(0), tree, config, kernels=kernels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = jl.lora_apply(fn, on_materialize="error")(jl.combine(tree, adapter), X)
    rtol = 2e-2 if name == "convert_element_type" else 1e-5  # W0 was rounded, the sum was not
    assert_close(got, fn(merged_tree(tree, adapter), X), rtol)


def test_an_operation_runs_on_w0_once_whether_or_not_its_rule_applies():
    """A lookup is first read as a choice of kernels, a reshape as a move of axes."""
    tree, ids = {"w": W}, jnp.array([0, 2])
    for name, fn in (
        ("gather", lambda p, x: p["w"][ids]),
        ("reshape", lambda p, x: p["w"].reshape(36)),
    ):
        kernels = {"w": jl.Kernel("w", (6, 6), W.dtype, "dense", (0,), (1,))}
        config = jl.LoraConfig(rank=2, targets="w")
        adapter = jl.lora_init(jax.random.key(0), tree, config, kernels=kernels)
        run = jl.lora_apply(fn, on_materialize="allow")
        jaxpr = jax.make_jaxpr(run)(jl.combine(tree, adapter), X).jaxpr
        of_w0 = [
            eqn
            for eqn in equations(jaxpr)
            if eqn.primitive.name == name and eqn.invars[0].aval.shape == (6, 6)
        ]
        assert len(of_w0) == 1, name


def test_a_weight_that_the_model_freezes_has_frozen_factors():
    fn = lambda p, x: x @ lax.stop_gradient(p["w"])  # noqa: E731
    tree = {"w": W}
    adapter = randomized(jl.lora_init(jax.random.key(0), tree, jl.LoraConfig(rank=2, targets="w"),
        kernels=jl.find_kernels(fn, tree, X)))  # fmt: skip
    loss = lambda a: jl.lora_apply(fn)(jl.combine(tree, a), X).sum()  # noqa: E731
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(loss)(adapter)))


@pytest.mark.parametrize("name", sorted({*PROGRAMS} - {"gather", "shard_map", "all_gather"}))
def test_vary_sees_the_data_that_a_weight_meets(name):
    jaxpr = jax.make_jaxpr(PROGRAMS[name])(weight_of(name), X)
    closed = jax.make_jaxpr(lambda w, x: jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, w, x))(
        weight_of(name), X
    )
    met, other = vary.axes_of_data(
        closed.jaxpr, [vary.NO_AXES, frozenset({"d"})], [True, False], closed.consts
    )
    assert (met, other) == (frozenset({"d"}), vary.NO_AXES)


@pytest.mark.parametrize("interpretation", [Evaluate, Analyze, Vary])
def test_an_interpretation_reads_every_kind_of_rule(interpretation):
    for method in ("constant", "concerns", "move", "consume", "enter", "without_rule"):
        owner = next(cls for cls in interpretation.__mro__ if method in vars(cls))
        assert owner.__name__ != "Interpretation", method


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_whole(name):
    rule = RULES[name]
    assert (rule.read is None) == (rule.compute is None)
    assert rule != Rule()
    if rule.open is not None and name not in LOOKED_INTO:
        assert rule.rebuild is not None


def test_every_kind_of_program_can_be_entered_without_arrays():
    kinds = {programs.Body, programs.Scan, programs.While, programs.Cond, programs.ShardMap}
    assert {*abstract._ENTER} == kinds
