"""Sub-jaxprs are evaluated with factors: scan, remat, cond, while, jit, vmap, shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import jax_lora as jl
from tests.lora_cases import (
    adapt,
    assert_close,
    assert_equals_merged,
    merged_tree,
    random_tree,
    randomized,
)

X = jax.random.normal(jax.random.key(2), (3, 6))


def layer(w, x):
    return jnp.tanh(x @ w)


def scan_over(ws, x, **options):
    return lax.scan(lambda h, w: (layer(w, h), h.sum()), x, ws, **options)


SCANS = {
    "scan": lambda p, x: scan_over(p["w"], x),
    "reversed": lambda p, x: scan_over(p["w"], x, reverse=True),
    "unrolled": lambda p, x: scan_over(p["w"], x, unroll=2),
    "second axis": lambda p, x: scan_over(jnp.moveaxis(p["w2"], 1, 0), x),
    "last axis": lambda p, x: scan_over(jnp.moveaxis(p["w3"], -1, 0), x),
    "nested": lambda p, x: lax.scan(lambda h, ws: scan_over(ws, h), x, p["w4"]),
    "of remat": lambda p, x: lax.scan(
        lambda h, w: (jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)(w, h), None),
        x, p["w"]),
    "in remat": jax.checkpoint(lambda p, x: scan_over(p["w"], x)),
    "constant weight": lambda p, x: lax.scan(lambda h, _: (layer(p["w1"], h), h), x, None, length=3),
    "mapped": lambda p, x: lax.map(lambda w: layer(w, x), p["w"]),
    "of vmap": lambda p, x: lax.scan(
        lambda h, ws: (jax.vmap(layer)(ws, h), None), jnp.stack([x, x]), p["w4"].swapaxes(0, 1))[0],
    "in jit": jax.jit(lambda p, x: scan_over(p["w"], x)),
    "carried untouched": lambda p, x: lax.scan(
        lambda c, _: ((c[0], layer(c[0], c[1])), None), (p["w1"], x), None, length=2)[0][1],
}  # fmt: skip
SHAPES = {"w": (4, 6, 6), "w1": (6, 6), "w2": (6, 4, 6), "w3": (6, 6, 4), "w4": (2, 4, 6, 6)}


@pytest.mark.parametrize("name", SCANS)
def test_scan(name):
    tree = random_tree(SHAPES)
    used = jl.find_kernels(SCANS[name], tree, X)
    assert_equals_merged(SCANS[name], {path: tree[path] for path in used}, X)


@pytest.mark.parametrize(
    ("name", "leaf", "stack_axes"),
    [
        ("scan", "w", (0,)),
        ("second axis", "w2", (1,)),
        ("last axis", "w3", (2,)),
        ("nested", "w4", (0, 1)),
    ],
)
def test_find_kernels_sees_the_scanned_axis(name, leaf, stack_axes):
    kernel = jl.find_kernels(SCANS[name], random_tree(SHAPES), X)[leaf]
    assert kernel.stack_axes == stack_axes
    assert len(kernel.in_axes) == len(kernel.out_axes) == 1


def test_flops_count_every_trip_of_a_scan():
    kernel = jl.find_kernels(SCANS["scan"], random_tree(SHAPES), X)["w"]
    assert kernel.flops == 4 * 2 * 3 * 6 * 6


def test_stacked_biases_are_no_kernels():
    def apply(p, x):
        return lax.scan(lambda h, wb: (jnp.tanh(h @ wb["w"] + wb["b"][None]), None), x, p)[0]

    tree = {"w": random_tree((4, 6, 6)), "b": random_tree((4, 6))}
    assert list(jl.find_kernels(apply, tree, X)) == ["w"]
    assert_equals_merged(apply, tree, X)


def test_a_carry_that_changes_materialises_and_is_right():
    def powers(p, x):
        return lax.scan(lambda w, _: (w * 0.5 @ w, (x @ w).sum()), p["w1"], None, length=3)

    tree = {"w1": random_tree((6, 6))}
    adapter = adapt(lambda p, x: x @ p["w1"], tree, X)
    assert_equals_merged(powers, tree, X, adapter=adapter, on_materialize="allow")


@jax.custom_jvp
def rounded_product(w, x):
    return jnp.sin(x @ w)


rounded_product.defjvp(
    lambda primals, tangents: (
        rounded_product(*primals),
        jnp.cos(primals[1] @ primals[0]) * (tangents[1] @ primals[0] + primals[1] @ tangents[0]),
    )
)


@jax.custom_vjp
def clipped_product(w, x):
    return x @ w


clipped_product.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda kept, g: (kept[1].T @ (0.5 * g), (0.5 * g) @ kept[0].T),
)

BRANCHES = {
    "cond": lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: 2 * x),
    "cond with operands": lambda p, x: lax.cond(x[0, 0] < 9, layer, lambda w, x: x - x @ w, p["w"], x),
    "switch": lambda p, x: lax.switch(
        jnp.int32(1), [lambda w: x, lambda w: x @ w, lambda w: x @ w.T], p["w"]),
    "jit": lambda p, x: jax.jit(layer)(p["w"], x),
    "jit twice": lambda p, x: jax.jit(layer)(p["w"], jax.jit(layer)(p["w"], x)),
    "jit returns a weight": lambda p, x: x @ jax.jit(jnp.transpose)(p["w"]),
    "remat": lambda p, x: jax.checkpoint(layer)(p["w"], x),
    "remat that saves nothing": jax.checkpoint(
        lambda p, x: layer(p["w"], x), policy=jax.checkpoint_policies.nothing_saveable),
    "vmap over data": lambda p, x: jax.vmap(lambda row: layer(p["w"], row))(x),
    "activation with a custom rule": lambda p, x: jax.nn.relu(x @ p["w"]) + jax.nn.silu(x @ p["w"]),
    "logsumexp": lambda p, x: jax.nn.logsumexp(x @ p["w"], axis=-1),
    "fori_loop": lambda p, x: lax.fori_loop(0, 3, lambda i, h: layer(p["w"], h), x),
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_programs_inside(name):
    assert_equals_merged(BRANCHES[name], {"w": random_tree((6, 6))}, X)


def test_a_weight_that_enters_a_custom_jvp_materialises_and_is_right():
    fn = lambda p, x: rounded_product(p["w"], x)  # noqa: E731
    tree = {"w": random_tree((6, 6))}
    assert list(jl.find_kernels(fn, tree, X)) == ["w"]
    assert_equals_merged(fn, tree, X, on_materialize="allow")


def test_a_weight_that_enters_a_custom_vjp_materialises_and_keeps_its_rule():
    fn = lambda p, x: clipped_product(p["w"], x)  # noqa: E731
    tree = {"w": random_tree((6, 6))}
    adapter = adapt(fn, tree, X)
    ours = lambda a: jl.lora_apply(fn, on_materialize="allow")(jl.combine(tree, a), X).sum()  # noqa: E731
    theirs = lambda a: fn(merged_tree(tree, a), X).sum()  # noqa: E731
    assert_close(jax.grad(ours)(adapter), jax.grad(theirs)(adapter), 1e-4)


def test_while_loop_in_forward_mode():
    def apply(p, x):
        return lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, layer(p["w"], s[1])), (0, x)
        )[1]

    tree = {"w": random_tree((6, 6))}
    adapter = adapt(apply, tree, X)
    ours = lambda a: jl.lora_apply(apply, on_materialize="error")(jl.combine(tree, a), X)  # noqa: E731
    theirs = lambda a: apply(merged_tree(tree, a), X)  # noqa: E731
    tangent = randomized(adapter, 3)
    assert_close(
        jax.jvp(ours, (adapter,), (tangent,)), jax.jvp(theirs, (adapter,), (tangent,)), 1e-4
    )


def test_a_while_loop_may_test_the_weight():
    def apply(p, x):
        keep = lambda h: jnp.abs(h @ p["w"]).sum() > 1.0  # noqa: E731
        return lax.while_loop(keep, lambda h: 0.5 * h, x)

    tree = {"w": random_tree((6, 6))}
    adapter = adapt(lambda p, x: x @ p["w"], tree, X)
    got = jl.lora_apply(apply, on_materialize="error")(jl.combine(tree, adapter), X)
    assert_close(got, apply(merged_tree(tree, adapter), X), 1e-5)


@pytest.mark.parametrize(
    "specs",
    [
        (P(), P()),
        (P("rows", None), P()),
        (P(None, "cols"), P("cols", None)),
        (P(), P(None, "cols")),
    ],
)
def test_shard_map(specs):
    mesh = jax.make_mesh((2, 4), ("rows", "cols"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x_spec, w_spec = specs
    summed = x_spec == P(None, "cols")
    out_spec = P(x_spec[0] if len(x_spec) else None, w_spec[1] if len(w_spec) else None)

    def body(x, w):
        y = x @ w
        return lax.psum(y, "cols") if summed else y

    def apply(p, x):
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_spec)(x, p["w"])

    tree, x = {"w": random_tree((8, 4))}, jax.random.normal(jax.random.key(1), (4, 8))
    assert_equals_merged(apply, tree, x)


def test_vmap_over_adapters_equals_running_each_alone():
    apply = lambda p, x: scan_over(p["w"], x)[0]  # noqa: E731
    tree = {"w": random_tree((4, 6, 6))}
    adapters = [randomized(adapt(apply, tree, X), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    run = lambda adapter, x: jl.lora_apply(apply)(jl.combine(tree, adapter), x)  # noqa: E731
    together = jax.vmap(run)(stacked, jnp.stack([X, 2 * X, 3 * X]))
    for i, adapter in enumerate(adapters):
        assert_close(together[i], run(adapter, (i + 1) * X), 1e-5)


def test_gradients_of_each_example_by_vmap_of_grad():
    apply = lambda p, x: layer(p["w"], x).sum()  # noqa: E731
    tree = {"w": random_tree((6, 6))}
    adapter = adapt(lambda p, x: layer(p["w"], x), tree, X)
    loss = lambda a, row: jl.lora_apply(apply)(jl.combine(tree, a), row)  # noqa: E731
    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(adapter, X)
    summed = jax.tree.map(lambda leaf: leaf.sum(0), each)
    assert_close(summed, jax.grad(loss)(adapter, X), 1e-4)


def test_hessian_vector_products():
    apply = lambda p, x: (scan_over(p["w"], x)[0] ** 2).sum()  # noqa: E731
    tree = {"w": random_tree((4, 6, 6))}
    adapter = adapt(apply, tree, X)
    direction = randomized(adapter, 4)

    def product(loss):
        return jax.jvp(jax.grad(loss), (adapter,), (direction,))[1]

    ours = product(lambda a: jl.lora_apply(apply)(jl.combine(tree, a), X))
    assert_close(ours, product(lambda a: apply(merged_tree(tree, a), X)), 1e-4)


def test_remat_keeps_its_policy():
    def apply(p, x):
        policy = jax.checkpoint_policies.save_only_these_names("kept")
        inside = lambda h: jnp.sin(checkpoint_name(jnp.sin(h @ p["w"]), "kept"))  # noqa: E731
        return jax.checkpoint(inside, policy=policy)(x).sum()

    tree = {"w": random_tree((6, 6))}
    adapter = adapt(apply, tree, X)
    run = lambda a: jl.lora_apply(apply)(jl.combine(tree, a), X)  # noqa: E731
    text = str(jax.make_jaxpr(run)(adapter))
    assert "policy=None" not in text and "remat" in text
    assert "name=kept" in text


def test_an_inner_jit_compiles_once_over_calls():
    traces = []

    @jax.jit
    def counted(w, x):
        traces.append(None)
        return layer(w, x)

    tree = {"w": random_tree((6, 6))}
    adapter = adapt(lambda p, x: layer(p["w"], x), tree, X)
    run = jl.lora_apply(lambda p, x: counted(p["w"], x))
    with jax.log_compiles(False):
        for seed in range(3):
            run(jl.combine(tree, randomized(adapter, seed)), X)
    assert len(traces) == 1


def test_static_arguments_and_other_results_pass_through():
    def apply(p, x, *, mode, scale=1.0, hook=None):
        if mode == "double":
            scale = 2 * scale
        return {"y": hook(x @ p["w"] * scale), "mode": mode, "none": None, "count": 3}

    tree = {"w": random_tree((6, 6))}
    adapter = adapt(lambda p, x: x @ p["w"], tree, X)
    out = jl.lora_apply(apply)(jl.combine(tree, adapter), X, mode="double", hook=jnp.sin)
    assert (out["mode"], out["none"], out["count"]) == ("double", None, 3)
    assert_close(out["y"], jnp.sin(X @ merged_tree(tree, adapter)["w"] * 2.0), 1e-5)


def test_adapted_leaves_may_stand_in_any_argument():
    tree = {"w": random_tree((6, 6))}
    adapter = adapt(lambda p, x: x @ p["w"], tree, X)
    combined = jl.combine(tree, adapter)
    out = jl.lora_apply(lambda x, *, params: x @ params["w"])(X, params=combined)
    assert_close(out, X @ merged_tree(tree, adapter)["w"], 1e-5)


def test_a_tree_without_an_adapter_runs_the_function_itself():
    calls = []
    fn = lambda p, x: calls.append(p) or x @ p["w"]  # noqa: E731
    tree = {"w": random_tree((6, 6))}
    jl.lora_apply(fn)(tree, X)
    assert calls[0] is tree


def test_base_and_lora_calls_do_not_leak_into_each_other():
    tree = {"w": random_tree((6, 6))}
    products = {
        "matmul": lambda p, x: x @ p["w"],
        "tensordot": lambda p, x: jnp.tensordot(x, p["w"], 1),
        "einsum": lambda p, x: jnp.einsum("ti,io->to", x, p["w"]),
        "dot_general": lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ()))),
    }
    for fn in products.values():
        adapter = adapt(fn, tree, X)
        jitted = jax.jit(fn)
        before = fn(tree, X), jitted(tree, X)
        adapted = jl.lora_apply(jitted)(jl.combine(tree, adapter), X)
        after = fn(tree, X), jitted(tree, X)
        assert np.array_equal(before, after)
        assert_close(adapted, fn(merged_tree(tree, adapter), X), 1e-5)
        assert not np.allclose(adapted, before[0])


def test_an_unknown_policy_is_refused():
    with pytest.raises(jl.errors.ConfigError, match="on_materialize"):
        jl.lora_apply(lambda p: p, on_materialize="maybe")


def test_a_materialisation_warns_once_per_site():
    tree = {"w": random_tree((6, 6))}
    adapter = adapt(lambda p, x: x @ p["w"], tree, X)
    run = jl.lora_apply(lambda p, x: x @ jnp.tanh(p["w"]))
    with pytest.warns(jl.errors.MaterializeWarning, match=r"test_control_flow.py:\d+") as seen:
        run(jl.combine(tree, adapter), X)
        run(jl.combine(tree, adapter), X)
    assert len(seen) == 1


def test_wraps_keeps_the_name():
    def forward(p, x):
        return x @ p["w"]

    assert jl.lora_apply(forward).__name__ == "forward"
    assert jl.lora_apply(functools.partial(forward)) is not None
