"""Quantized base weights: computed where they are used, and never kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.algebra.base_weight import Recipe
from jax_lora.errors import ConfigError, StructureError
from tests.lora_cases import assert_bitwise, assert_close, equations, random_tree, randomized

METHODS = ["float8", "int8", "nf4"]
BYTES = ["float8", "int8"]
X = random_tree((3, 8), 4)
PARAMS = random_tree({"stack": (4, 8, 8), "one": (8, 8), "embed": (7, 8), "head": (8, 5)})


def model(p, x):
    """A scanned stack with a cast, a transposed kernel, a table that is looked up, and a head."""

    def layer(h, w):
        return jnp.tanh(h @ w.astype(h.dtype)), None

    h = lax.scan(layer, x, p["stack"])[0]
    h = jnp.tanh(h @ p["one"].T) + p["embed"][jnp.array([1, 5, 1])]
    return h @ p["head"]


KERNELS = jl.find_kernels(model, PARAMS, X)


def quantize(params, method, kernels):
    """Compile the methods that run on the device: each operation alone would be compiled too."""
    run = functools.partial(jl.quantize, method=method, targets=list(kernels), kernels=kernels)
    return run(params) if method == "nf4" else jax.jit(run)(params)


dequantize = jax.jit(jl.dequantize)


@functools.cache
def quantized(method):
    return quantize(PARAMS, method, KERNELS)


@functools.cache
def adapter():
    return adapter_of(PARAMS, KERNELS)


def adapter_of(params, kernels, **config):
    settings = jl.LoraConfig(rank=2, targets=list(kernels), **config)
    init = functools.partial(jl.lora_init, config=settings, kernels=kernels)
    return randomized(jax.eval_shape(init, jax.random.key(0), params))


@pytest.mark.parametrize("method", BYTES)
def test_codes_are_within_half_a_step(method):
    stored = quantized(method)
    for name, leaf in dequantize(stored).items():
        w = np.float64(PARAMS[name])
        kernel = KERNELS[name]  # an embedding has a scale per row
        shared = kernel.out_axes if kernel.kind == "embedding" else kernel.in_axes
        largest = np.abs(w).max(axis=shared, keepdims=True)
        # int8: half of 1/127 of the largest. float8 e4m3: 3 bits after the point, or a subnormal.
        smallest = largest / 448 / 512  # float8's
        step = largest / 254 if method == "int8" else np.maximum(np.abs(w) / 16, smallest)
        assert (np.abs(np.float64(leaf) - w) <= step * (1 + 1e-5)).all(), name


@pytest.mark.parametrize("method", BYTES)
def test_it_takes_a_byte_per_element_and_a_scale_per_output(method):
    leaf = quantized(method)["one"]
    assert (leaf.shape, leaf.dtype, leaf.method) == ((8, 8), jnp.float32, method)
    assert leaf.nbytes == 8 * 8 + 4 * 8


@pytest.mark.parametrize("method", METHODS)
def test_without_an_adapter_the_weights_are_the_dequantized_ones_bit_by_bit(method):
    """Rows of the identity select rows of a weight, in whatever order a backend adds."""

    def rows(p, x):
        stack = lax.scan(lambda h, w: (h, h @ w.astype(jnp.float32)), x, p["stack"])[1]
        return stack, x @ p["one"].T, p["embed"][jnp.arange(7)], x @ p["head"]

    stored = quantized(method)
    got = jax.jit(jl.lora_apply(rows, on_materialize="error"))(stored, np.eye(8, dtype="f"))
    w = jax.tree.map(np.asarray, dequantize(stored))
    assert_bitwise(got, (w["stack"], w["one"].T, w["embed"], w["head"]))


@pytest.mark.parametrize(
    ("method", "use_dora"), [("nf4", False), ("nf4", True), ("int8", False), ("float8", False)]
)
def test_values_and_gradients_are_those_on_the_dequantized_base(method, use_dora):
    """In float64, where the order of a sum does not show; the weights are made in float32."""
    with jax.enable_x64(True):
        params, x = jax.tree.map(np.float64, (PARAMS, X))
        stored = quantize(params, method, KERNELS)
        factors = jax.tree.map(np.float64, adapter_of(params, KERNELS, use_dora=use_dora))
        run = jl.lora_apply(model, on_materialize="error", form="factored")
        loss = lambda a, x, base: (run(jl.combine(base, a), x) ** 2).sum()  # noqa: E731
        step = jax.value_and_grad(loss, argnums=(0, 1))
        both = jax.jit(lambda *bases: [step(factors, x, base) for base in bases])(
            stored, dequantize(stored)
        )
        assert both[0][0].dtype == jnp.float64
        assert_close(*both, 1e-10)


@pytest.mark.parametrize(
    ("method", "mode"), [("float8", "fill"), ("int8", "clip"), ("nf4", "fill"), ("nf4", "clip")]
)
def test_a_lookup_decodes_only_the_rows_that_it_selects(method, mode):
    table = random_tree((300, 64), 3, jnp.bfloat16)
    ids = np.array([[1, 299, 0], [300, 7, 4000]], np.int32)  # two are out of range

    def look_up(p, ids):
        return jnp.take(p["table"].astype(jnp.float32), ids, axis=0, mode=mode)

    kernels = jl.find_kernels(look_up, {"table": table}, ids)
    stored = quantize({"table": table}, method, kernels)
    made = dequantize(stored)
    run = jax.jit(jl.lora_apply(look_up, on_materialize="error"))
    np.testing.assert_array_equal(run(stored, ids), jax.jit(look_up)(made, ids))
    jaxpr = jax.make_jaxpr(run)(stored, ids).jaxpr
    wide = {v.aval.size for e in equations(jaxpr) for v in e.outvars if v.aval.dtype == jnp.float32}
    assert max(wide) < table.size
    factors = adapter_of({"table": table}, kernels)
    got, want = (run(jl.combine(base, factors), ids) for base in (stored, made))
    np.testing.assert_array_equal(got, want)


def test_no_residual_holds_a_weight_that_was_made():
    stored, factors = quantized("int8"), adapter()
    run = jl.lora_apply(model)
    loss = lambda a: run(jl.combine(stored, a), X).sum()  # noqa: E731
    residuals = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(loss, a)[1], factors))
    assert residuals
    sizes = {leaf.shape for leaf in residuals if leaf.dtype == jnp.float32}
    assert not sizes & {(4, 8, 8), (8, 8), (7, 8)}


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_holds_the_weights_of_one_layer(method):
    stored, factors = quantized(method), adapter()
    run = jl.lora_apply(model)
    loss = lambda a, stored: run(jl.combine(stored, a), X).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(factors, stored).compile().as_text()
    assert "f32[8,8]" in text and "f32[4,8,8]" not in text


def test_a_scan_slices_the_codes():
    stored = quantized("int8")
    jaxpr = jax.make_jaxpr(jl.lora_apply(model))(stored, X).jaxpr
    (scan,) = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]
    assert (4, 8, 8) in {v.aval.shape for v in scan.invars if v.aval.dtype == jnp.int8}
    assert (4, 8, 8) not in {v.aval.shape for v in scan.invars if v.aval.dtype == jnp.float32}


def test_it_merges_into_plain_arrays():
    stored, factors = quantized("int8"), adapter()
    merged = jax.jit(jl.merge)(stored, factors)
    assert all(isinstance(leaf, jax.Array) for leaf in merged.values())
    got = jax.jit(jl.lora_apply(model))(jl.combine(stored, factors), X)
    assert_close(got, jax.jit(model)(merged, X), 1e-5)


def test_combine_and_partition_give_the_quantized_base_back():
    stored = quantized("int8")
    base, again = jl.partition(jl.combine(stored, adapter()))
    assert base["one"] is stored["one"]
    assert jax.tree.structure(again) == jax.tree.structure(adapter())


def test_an_adapter_is_saved_with_the_fingerprint_of_the_codes(tmp_path):
    stored, factors = quantized("int8"), adapter()
    jl.save_adapter(tmp_path / "adapter", factors, base=stored)
    assert_bitwise(jl.load_adapter(tmp_path / "adapter", base=stored), factors)
    with pytest.raises(jl.errors.BaseMismatchError, match="has different values"):
        jl.load_adapter(tmp_path / "adapter", base=quantized("float8"))


def test_kernels_of_a_quantized_tree_are_the_same():
    assert dict(jl.find_kernels(model, quantized("int8"), X)) == dict(KERNELS)


def test_a_weight_of_zeros_stays_zero():
    stored = jl.quantize({"kernel": jnp.zeros((4, 3))}, "int8")
    assert_bitwise(jl.dequantize(stored), {"kernel": jnp.zeros((4, 3))})


def test_a_recipe_of_ones_own_is_a_base():
    """A kernel that is stored as a product of two factors, for example."""
    left, right = random_tree((8, 3), 1), random_tree((3, 6), 2)
    base = {
        "kernel": Recipe((left, right), _product, (8, 6), jnp.dtype("float32"), sliceable=False)
    }
    fn = lambda p, x: jnp.tanh(x @ p["kernel"])  # noqa: E731
    assert_close(jax.jit(jl.lora_apply(fn))(base, X), jnp.tanh(X @ (left @ right)), 1e-6)


def _product(factors):
    return factors[0] @ factors[1]


@pytest.mark.parametrize("memory", ["pinned_host"])
def test_codes_may_lie_in_host_memory(memory):
    device = jax.devices()[0]
    if memory not in {each.kind for each in device.addressable_memories()}:
        pytest.skip(f"this backend has no {memory} memory")
    there = jax.sharding.SingleDeviceSharding(device, memory_kind=memory)
    base = {
        "kernel": Recipe(jax.device_put(PARAMS["one"], there), _fetch, (8, 8), jnp.dtype("float32"))
    }
    fn = lambda p, x: jnp.tanh(x @ p["kernel"])  # noqa: E731
    got = jax.jit(jl.lora_apply(fn))(base, X)
    assert_close(got, fn({"kernel": PARAMS["one"]}, X), 1e-6)


def _fetch(array):
    return jax.device_put(array, jax.memory.Space.Device)


def test_a_single_name_may_be_excluded():
    shapes = jax.eval_shape(lambda: PARAMS)
    stored = jl.quantize(shapes, "int8", exclude="head", targets=list(KERNELS), kernels=KERNELS)
    assert {name for name, leaf in stored.items() if isinstance(leaf, Recipe)} == {*KERNELS} - {
        "head"
    }


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="got:      'nf5'\n  expected: one of float8, int8, nf4"):
        jl.quantize(PARAMS, "nf5", targets=list(KERNELS), kernels=KERNELS)


def test_what_is_quantized_or_adapted_already_is_refused():
    for tree in (quantized("int8"), jl.combine(PARAMS, adapter())):
        with pytest.raises(StructureError, match="on the unquantized parameters"):
            jl.quantize(tree, "int8", targets="one", kernels=KERNELS)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(StructureError, match="kernel\n  got:      elements that are NaN or Inf"):
        jl.quantize({"kernel": jnp.full((4, 3), jnp.inf)}, "int8")
