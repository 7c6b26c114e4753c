"""DoRA: trained magnitudes, compared with the merged weights."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.test_util import check_grads

import jax_lora as jl
from jax_lora.errors import CheckpointError, MergeError
from tests.checkpoint.test_adapter_checkpoint import reseal
from tests.lora_cases import (
    adapt,
    assert_bitwise,
    assert_close,
    assert_equals_merged,
    equations,
    merged_tree,
    random_tree,
    randomized,
)

X = jax.random.normal(jax.random.key(2), (3, 8))
IDS = jnp.array([[0, 3, 6], [1, 1, 5]])
SIZES = jnp.array([2, 0, 1], jnp.int32)


def conv(p, x):
    layout = ("NHWC", "HWIO", "NHWC")
    x = jnp.stack([x, x * x]).reshape(2, 3, 2, 4)
    options = {"dimension_numbers": layout, "feature_group_count": 2}
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", **options)


# name -> (shape of the kernel, function of it and X)
CASES = {
    "dense": ((8, 6), lambda p, x: x @ p["w"]),
    "weight first": ((6, 8), lambda p, x: p["w"] @ x.T),
    "heads out": ((8, 2, 3), lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"])),
    "heads in": ((2, 4, 5), lambda p, x: jnp.einsum("thk,hkd->td", x.reshape(3, 2, 4), p["w"])),
    "scanned": (
        (3, 8, 8),
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, p["w"]),
    ),
    "experts": (
        (2, 8, 5),
        lambda p, x: jnp.einsum("ecd,edo->eco", jnp.stack([x, x * x]), p["w"]),
    ),
    "tokens sorted by expert": ((3, 8, 5), lambda p, x: lax.ragged_dot(x, p["w"], SIZES)),
    "chosen layers": (
        (2, 8, 6),
        lambda p, x: jnp.einsum("ti,tio->to", x, p["w"][jnp.array([0, 1, 1])]) + x @ p["w"][1],
    ),
    "lookup": ((7, 4), lambda p, x: p["w"][IDS]),
    "lookup out of range": (
        (7, 4),
        lambda p, x: jnp.nan_to_num(jnp.take(p["w"], IDS + 3, axis=0, mode="fill")),
    ),
    "tied head": ((7, 4), lambda p, x: jnp.tanh(p["w"][IDS]) @ p["w"].T),
    "convolution": ((3, 3, 2, 6), conv),
    "reshaped and cut": (
        (8, 6),
        lambda p, x: jnp.einsum("ti,iab->tab", x, p["w"].reshape(8, 2, 3)[:, :, 1:]),
    ),
    "scaled, cast and transposed": (
        (8, 6),
        lambda p, x: -2.0 * ((p["w"] * jnp.arange(1.0, 7.0)[None]).astype(jnp.float32).T @ x.T),
    ),
    "read together": (
        (8, 6),
        lambda p, x: jnp.tanh(x @ p["w"]) * (x @ (p["w"] * 2.0)) + x @ jnp.sin(x.T @ x)[:, :6],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_the_merged_weights(name):
    shape, fn = CASES[name]
    tree = {"w": random_tree(shape)}
    squared = lambda p, x: jax.tree.map(jnp.square, fn(p, x))  # noqa: E731 - no output head
    assert_equals_merged(squared, tree, X, adapter=adapt(squared, tree, X, use_dora=True))


MATERIALISED = {
    "a gain that varies along what is summed and what is not": (
        (8, 2, 4),
        lambda p, x: (
            jnp.einsum("thk,dhk->thd", x.reshape(3, 2, 4), p["w"])
            + jnp.einsum("tk,dhk->thd", x[:, :4], p["w"])
        ),
    ),
    "a sum with another array": ((8, 6), lambda p, x: x @ (p["w"] + jnp.ones((8, 6)))),
    "a function of the weight": ((8, 6), lambda p, x: x @ jnp.tanh(p["w"])),
}


@pytest.mark.parametrize("name", MATERIALISED)
def test_where_a_gain_cannot_go_along_the_weight_is_formed(name):
    shape, fn = MATERIALISED[name]
    tree = {"w": random_tree(shape)}
    kernel = jl.Kernel("w", shape, jnp.float32, "dense", (0,), tuple(range(1, len(shape))))
    config = jl.LoraConfig(rank=2, targets="w", use_dora=True)
    adapter = jl.lora_init(jax.random.key(0), tree, config, kernels={"w": kernel})
    assert_equals_merged(fn, tree, X, adapter=randomized(adapter), on_materialize="allow")
    with pytest.raises(jl.errors.MaterializeError):
        jl.lora_apply(fn, on_materialize="error")(jl.combine(tree, adapter), X)


# -----------------------------------------------------------------------------------------------
# The start
# -----------------------------------------------------------------------------------------------


def decoder(p, ids):
    """A scan, heads, a tied table."""
    x = p["embed"][ids]  # (batch, tokens, d)

    def layer(x, kernels):
        heads = jnp.einsum("btd,dhk->bthk", x, kernels["q"])
        return x + jnp.einsum("bthk,hkd->btd", jnp.tanh(heads), kernels["o"]), None

    x, _ = lax.scan(layer, x, p["layers"])
    return x @ p["embed"].T


SHAPES = {"embed": (7, 6), "layers": {"q": (3, 6, 2, 4), "o": (3, 2, 4, 6)}}


def dora_of(tree, **config):
    kernels = jl.find_kernels(decoder, tree, IDS)
    config = jl.LoraConfig(rank=2, use_dora=True, targets=["embed", "layers"], **config)
    return jl.lora_init(jax.random.key(0), tree, config, kernels=kernels)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11) and os.environ.get("JAX_LORA_OPTIMIZED_TESTS", "0") == "0",
    reason="without optimizations, a newer XLA rounds tanh(x) and tanh(x * 1) differently",
)
@pytest.mark.parametrize(
    ("dtype", "jitted"),
    [
        pytest.param("float32", False, marks=pytest.mark.slow),
        ("float32", True),
        ("bfloat16", True),
    ],
)
def test_step_zero_is_the_base_bit_by_bit(dtype, jitted):
    wrap = jax.jit if jitted else lambda fn: fn
    tree = random_tree(SHAPES, dtype=dtype)
    adapter = dora_of(tree)
    for pair in adapter.pairs.values():
        assert pair.magnitude.dtype == jnp.float32
    run = wrap(jl.lora_apply(decoder, on_materialize="error"))
    assert_bitwise(run(jl.combine(tree, adapter), IDS), wrap(decoder)(tree, IDS))
    assert_bitwise(jl.merge(tree, adapter), tree)


@pytest.mark.parametrize("inputs", [48, 1000])
def test_step_zero_is_the_base_however_the_norm_is_added_up(inputs):
    """The magnitude comes from one program and the norm from another, which may order its sum."""
    base = random_tree({"kernel": (inputs, 64)})
    config = jl.LoraConfig(rank=2, use_dora=True)
    pair = jl.lora_init(jax.random.key(0), base, config).pairs["kernel"]
    in_order = functools.reduce(np.add, np.asarray(base["kernel"]) ** 2)  # (64,), one by one
    other = dataclasses.replace(pair, magnitude=jnp.sqrt(jnp.asarray(in_order)))
    assert (other.magnitude != pair.magnitude).any()
    assert (other.gain(base["kernel"]).array == 1).all()
    moved = dataclasses.replace(pair, magnitude=pair.magnitude * np.float32(1 + 1e-5))
    assert (moved.gain(base["kernel"]).array > 1).all()

    def total(magnitude):
        return dataclasses.replace(pair, magnitude=magnitude).gain(base["kernel"]).array.sum()

    assert_close(jax.grad(total)(pair.magnitude), 1 / pair.magnitude, 1e-6)


def test_magnitudes_start_as_the_norms_over_the_inputs():
    tree = random_tree(SHAPES)
    pairs = dora_of(tree).pairs
    norm = lambda leaf, axes: np.sqrt((np.asarray(leaf, np.float64) ** 2).sum(axes))  # noqa: E731
    assert_close(pairs["embed"].magnitude, np.float32(norm(tree["embed"], 0)), 1e-6)
    layers = tree["layers"]
    assert_close(pairs["layers/q"].magnitude, np.float32(norm(layers["q"], 1)), 1e-6)
    assert_close(pairs["layers/o"].magnitude, np.float32(norm(layers["o"], (1, 2))), 1e-6)


def test_magnitudes_of_shapes_are_shapes():
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), SHAPES, is_leaf=tuple_of)
    pair = dora_of(tree, dtype="bfloat16").pairs["layers/q"]
    assert (pair.magnitude.shape, pair.magnitude.dtype) == ((3, 2, 4), jnp.bfloat16)
    shapes = jax.eval_shape(dora_of, random_tree(SHAPES))
    assert shapes.pairs["layers/o"].magnitude.shape == (3, 6)


def tuple_of(node):
    return isinstance(node, tuple)


def test_every_magnitude_and_b_gets_a_gradient_at_step_zero_and_the_base_none():
    tree = random_tree(SHAPES)
    run = jl.lora_apply(decoder, on_materialize="error")
    combined = jl.combine(tree, dora_of(tree))
    gradient = jax.jit(jax.grad(lambda each: (run(each, IDS) ** 2).sum()))(combined)
    base, adapter = jl.partition(gradient)
    assert not any(leaf.any() for leaf in jax.tree.leaves(base))
    for pair in adapter.pairs.values():
        assert pair.magnitude.all() and pair.b.any() and not pair.a.any()


@pytest.mark.slow
def test_the_derivative_by_the_magnitude_agrees_with_finite_differences():
    with jax.enable_x64(True):
        tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_tree(SHAPES))
        adapter = randomized(dora_of(tree, dtype="float64"))
        run = jl.lora_apply(decoder, on_materialize="error")

        def of_magnitudes(magnitudes):
            pairs = {
                path: dataclasses.replace(pair, magnitude=magnitudes[path])
                for path, pair in adapter.pairs.items()
            }
            return run(jl.combine(tree, jl.Adapter(pairs, {}, adapter.config)), IDS)

        magnitudes = {path: pair.magnitude for path, pair in adapter.pairs.items()}
        check_grads(jax.jit(of_magnitudes), (magnitudes,), order=2, modes=("fwd", "rev"), rtol=1e-6)


def test_the_norm_is_a_constant_for_differentiation():
    tree, x = {"w": jnp.eye(2)}, jnp.ones((1, 2))
    pair = jl.LoraPair(jnp.ones((2, 1)), jnp.ones((1, 2)), magnitude=jnp.ones(2))
    make = lambda a: dataclasses.replace(pair, a=a)  # noqa: E731
    adapter = lambda a: jl.Adapter({"w": make(a)}, {}, jl.LoraConfig(rank=1))  # noqa: E731
    run = jl.lora_apply(lambda p, x: x @ p["w"])
    gradient = jax.grad(lambda a: run(jl.combine(tree, adapter(a)), x).sum())(pair.a)
    norm = np.sqrt(2.0**2 + 1.0**2)  # of every column of eye + ones
    assert_close(gradient, np.full((2, 1), 2 / norm, np.float32), 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms_are_those_of_the_sum_in_float32(dtype):
    base = random_tree((3, 40, 6), dtype=dtype)
    pair = jl.LoraPair(
        random_tree((3, 40, 4), 2), random_tree((3, 4, 6), 3), (1,), (2,), (0,), (1.0, 2.0, 0.5)
    )
    ones = dataclasses.replace(pair, magnitude=jnp.ones((3, 6)))
    scales = np.array([1.0, 2.0, 0.5])[:, None, None]
    a, b = np.asarray(pair.a, np.float64), np.asarray(pair.b, np.float64)
    formed = np.asarray(base, np.float64) + scales * np.einsum("lir,lro->lio", a, b)
    want = 1 / np.sqrt((formed**2).sum(1))
    np.testing.assert_allclose(ones.gain(base).array, want, rtol=3e-6)


def test_outputs_whose_weights_are_zero_learn():
    tree = {"kernel": jnp.zeros((4, 3))}
    config = jl.LoraConfig(rank=2, use_dora=True)
    adapter = jl.lora_init(jax.random.key(0), tree, config)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    run = jl.lora_apply(lambda p, x: x @ p["kernel"])
    loss = lambda each: ((run(jl.combine(tree, each), x) - 1.0) ** 2).mean()  # noqa: E731
    start = loss(adapter)
    for _ in range(60):
        gradient = jax.grad(loss)(adapter)
        adapter = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, adapter, gradient)
    assert np.isfinite(loss(adapter)) and loss(adapter) < 0.9 * start


# -----------------------------------------------------------------------------------------------
# Cost, layers, dropout
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["factored", "merged"])
def test_no_gradient_and_no_residual_has_the_shape_of_a_kernel(form):
    shape, tokens = (3, 24, 40), jnp.ones((7, 24))
    tree = random_tree({"up": shape, "down": (3, 40, 24)})

    def model(p, x):
        step = lambda x, w: (jnp.tanh(x @ w["up"]) @ w["down"], None)  # noqa: E731
        return lax.scan(step, x, p)[0]

    adapter = adapt(model, tree, tokens, use_dora=True)
    run = jl.lora_apply(model, on_materialize="error", form=form)
    loss = lambda each, x: (run(jl.combine(tree, each), x) ** 2).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapter, tokens).jaxpr
    is_kernel = lambda var: sorted(var.aval.shape[-2:]) == [24, 40]  # noqa: E731
    makers = [eqn.primitive.name for eqn in equations(program) if any(map(is_kernel, eqn.outvars))]
    assert not {"dot_general", "scan", "while"} & set(makers)


def test_layers_that_are_left_out_are_the_base_whatever_their_magnitude():
    tree = random_tree(SHAPES)
    adapter = dora_of(tree, layers=[1])
    q = adapter.pairs["layers/q"]
    assert not q.magnitude[jnp.array([0, 2])].any() and q.magnitude[1].all()
    assert q.size == 2 * (6 + 8) + 8
    q = dataclasses.replace(q, magnitude=2 * q.magnitude + 1)
    adapter = jl.Adapter({"layers/q": q}, {}, adapter.config)
    merged = jl.merge(tree, adapter)["layers"]["q"]
    assert_bitwise(merged[0], tree["layers"]["q"][0])
    assert (merged[1] != tree["layers"]["q"][1]).any()


def test_only_what_training_changes_sees_dropout():
    weight = jnp.eye(32)
    pair = jl.LoraPair(
        random_tree((32, 2)), jnp.zeros((2, 32)), magnitude=jnp.full(32, 1.5), scale=0.5
    )
    moved = dataclasses.replace(pair, b=random_tree((2, 32), 3))
    x = jnp.abs(random_tree((4, 32), 5)) + 1.0

    def run(pair, fn):
        config = jl.LoraConfig(rank=2, dropout=0.5)
        tree = jl.combine({"w": weight}, jl.Adapter({"w": pair}, {}, config))
        return jl.lora_apply(fn, on_materialize="error")(jl.dropout(tree, jax.random.key(1)), x)

    outputs = run(pair, lambda p, x: x @ p["w"])
    seen = (outputs - x) / 0.5  # the gain is 1.5, and the weight an identity
    kept = np.isclose(seen, 2 * x, atol=1e-5)
    assert (kept | np.isclose(seen, 0, atol=1e-5)).all() and 0.3 < kept.mean() < 0.7
    norms = jnp.linalg.norm(weight + 0.5 * moved.a @ moved.b, axis=0)  # (out,)
    gain = (moved.magnitude / norms)[None]  # (1, out)
    delta = 0.5 * (seen @ moved.a) @ moved.b
    want = x + (gain - 1) * seen + gain * delta
    assert_close(run(moved, lambda p, x: x @ p["w"]), want, 1e-5)
    # The other way round the gain lies on the data.
    turned = run(pair, lambda p, x: x @ p["w"].T)
    seen = (turned - x) / 0.5
    kept = np.isclose(seen, 2 * x, atol=1e-5)
    assert (kept | np.isclose(seen, 0, atol=1e-5)).all() and 0.3 < kept.mean() < 0.7
    want = x + ((gain - 1) * seen) @ weight + 0.5 * ((gain * seen) @ moved.b.T) @ moved.a.T
    assert_close(run(moved, lambda p, x: x @ p["w"].T), want, 1e-5)


# -----------------------------------------------------------------------------------------------
# The rest of the library
# -----------------------------------------------------------------------------------------------


def test_merge_gives_what_lora_apply_computes_and_unmerge_refuses():
    tree = random_tree(SHAPES)
    adapter = randomized(dora_of(tree))
    merged = jl.merge(tree, adapter)
    assert_close(merged, merged_tree(tree, adapter), 1e-5)
    outputs = jax.jit(jl.lora_apply(decoder))(jl.combine(tree, adapter), IDS)
    assert_close(outputs, decoder(merged, IDS), 1e-4)
    with pytest.raises(MergeError, match="(?s)unmerge: embed, .*magnitudes.*fix: .*base variables"):
        jl.unmerge(merged, adapter)


def test_merging_a_magnitude_that_is_not_finite_names_it():
    adapter = dora_of(random_tree(SHAPES))
    pair = adapter.pairs["embed"]
    broken = dataclasses.replace(pair, magnitude=pair.magnitude.at[1].set(jnp.nan))
    adapter = jl.Adapter({**adapter.pairs, "embed": broken}, {}, adapter.config)
    with pytest.raises(MergeError, match="embed: 1 elements of magnitude are NaN or Inf"):
        jl.merge(random_tree(SHAPES), adapter)


def test_a_checkpoint_brings_magnitudes_back(tmp_path):
    tree = random_tree(SHAPES)
    adapter = randomized(dora_of(tree))
    jl.save_adapter(tmp_path / "adapter", adapter, base=tree)
    assert_bitwise(jl.load_adapter(tmp_path / "adapter", base=tree), adapter)
    shape = {"shape": [6, 1]}
    reseal(tmp_path / "adapter", lambda v: v["pairs"]["embed"]["magnitude"].update(shape))
    with pytest.raises(CheckpointError, match=r"magnitude must have shape \(6,\), got \(6, 1\)"):
        jl.load_adapter(tmp_path / "adapter")


def test_masked_optimizers_train_magnitudes_and_leave_the_base_alone():
    tree = random_tree(SHAPES)
    combined = jl.combine(tree, dora_of(tree))
    mask = jl.trainable_mask(combined)["layers"]["q"]
    assert (mask.base, mask.pair.magnitude, mask.pair.a) == (False, True, True)
    tx = jl.masked_optimizer(optax.adamw(1e-2, weight_decay=0.1))
    run = jl.lora_apply(decoder)
    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.jit(jax.grad(lambda each: (run(each, IDS) ** 2).sum()))(combined)
        updates, _ = tx.update(gradient, tx.init(combined), combined)
        base, adapter = jl.partition(optax.apply_updates(combined, updates))
    assert_bitwise(base, tree)
    start = jl.partition(combined)[1]
    for path, pair in adapter.pairs.items():
        assert (pair.magnitude != start.pairs[path].magnitude).all()


def test_the_summary_names_dora_and_counts_magnitudes():
    tree = random_tree(SHAPES)
    shown = jl.summary(tree, dora_of(tree))
    assert {row.kind for row in shown.rows} == {"dora"}
    assert shown.trainable == 2 * (7 + 6) + 6 + 3 * 2 * ((6 + 8) * 2) + 3 * (8 + 6)


def test_adapters_side_by_side_have_norms_of_their_own():
    tree, x = {"w": random_tree((8, 6))}, X
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    adapters = [randomized(adapt(fn, tree, x, use_dora=True), seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    together = jax.vmap(lambda each: jl.lora_apply(fn)(jl.combine(tree, each), x))(stacked)
    for one, adapter in zip(together, adapters, strict=True):
        assert_close(one, fn(merged_tree(tree, adapter), x), 1e-5)
