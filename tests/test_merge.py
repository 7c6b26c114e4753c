import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import MergeError, MergeWarning, StructureError
from jax_lora.merge import _merged_stack, merge, unmerge


def toy(dtype=jnp.float32, size=0.1):
    draw = np.random.default_rng(0)
    normal = lambda *shape, of=jnp.float32: jnp.asarray(draw.normal(size=shape), of)  # noqa: E731
    params = {
        "layers": {"kernel": normal(3, 12, 4, 5, of=dtype)},  # (layers, in, heads, head_dim)
        "up": {"kernel": normal(12, 20, of=dtype), "bias": normal(20, of=dtype)},
        "step": jnp.array(3, jnp.int32),
    }
    pairs = {
        "layers/kernel": jl.LoraPair(
            normal(3, 12, 2) * size, normal(3, 2, 4, 5) * size, (1,), (2, 3), (0,), scale=2.0
        ),
        "up/kernel": jl.LoraPair(normal(12, 2) * size, normal(2, 20) * size, scale=0.5),
    }
    return params, jl.Adapter(pairs, {}, jl.LoraConfig(rank=2, alpha=4.0))


def double(array):
    return np.asarray(array, np.float64)


def expected_delta(pair):
    """scale * a @ b in float64 by NumPy alone."""
    letters = {1: "ir,ro->io", 2: "lir,lrhd->lihd"}[len(pair.out_axes)]
    return pair.scale * np.einsum(letters, double(pair.a), double(pair.b))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merge_is_the_float64_sum_rounded_once(dtype):
    params, adapter = toy(dtype, size=1.0)
    merged = merge(params, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for path, pair in adapter.pairs.items():
        group = path.split("/")[0]
        want = double(params[group]["kernel"]) + expected_delta(pair)
        have = merged[group]["kernel"]
        assert have.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        # Half a unit of the result's own type, and the rounding of the float32 sum before it.
        bound = eps / 2 * np.abs(want) + 1e-5
        assert (np.abs(double(have) - want) <= bound).all()


def test_merge_leaves_the_base_alone_and_passes_other_leaves_on():
    params, adapter = toy()
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    merged = merge(params, adapter)
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)] == before
    assert merged["up"]["bias"] is params["up"]["bias"] and merged["step"] is params["step"]


def test_merge_replaces_leaves_trained_whole():
    params, adapter = toy(jnp.bfloat16)
    whole = {"up/bias": jnp.arange(20.0)}
    merged = merge(params, jl.Adapter(adapter.pairs, whole, adapter.config))
    assert merged["up"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(double(merged["up"]["bias"]), np.arange(20.0))


def test_merge_equals_lora_apply():
    params, adapter = toy()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 12)), jnp.float32)

    def model(params, x):
        return x @ params["up"]["kernel"] + params["up"]["bias"][None]

    with_lora = jl.lora_apply(model)(jl.combine(params, adapter), x)
    np.testing.assert_allclose(model(merge(params, adapter), x), with_lora, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerge_comes_back_within_the_bound_it_states(dtype):
    params, adapter = toy(dtype, size=1.0)
    again = unmerge(merge(params, adapter), adapter)
    eps = float(jnp.finfo(dtype).eps)
    inexact = 0
    for path, pair in adapter.pairs.items():
        group = path.split("/")[0]
        base, back = double(params[group]["kernel"]), double(again[group]["kernel"])
        assert (np.abs(back - base) <= eps * (np.abs(base) + np.abs(expected_delta(pair)))).all()
        inexact += (back != base).sum()
    assert inexact > 0  # so the documentation is right not to promise more


def test_unmerge_refuses_leaves_trained_whole():
    params, adapter = toy()
    adapter = jl.Adapter(adapter.pairs, {"up/bias": params["up"]["bias"]}, adapter.config)
    with pytest.raises(MergeError, match="unmerge: up/bias[\\s\\S]*Keep the base variables"):
        unmerge(merge(params, adapter), adapter)


def test_merge_and_unmerge_run_under_jit():
    params, adapter = toy()
    jitted = jax.jit(merge)(params, adapter)
    for have, want in zip(
        jax.tree.leaves(jitted), jax.tree.leaves(merge(params, adapter)), strict=True
    ):
        np.testing.assert_allclose(double(have), double(want), rtol=1e-6, atol=1e-6)
    shapes = jax.eval_shape(unmerge, jitted, adapter)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_merge_refuses_factors_that_are_not_finite_and_names_them(bad):
    params, adapter = toy()
    pair = adapter.pairs["layers/kernel"]
    pair = jl.LoraPair(
        pair.a.at[1, 2, 0].set(bad), pair.b, pair.in_axes, pair.out_axes, pair.stack_axes
    )
    broken = jl.Adapter({**adapter.pairs, "layers/kernel": pair}, {}, adapter.config)
    for function in (merge, unmerge):
        with pytest.raises(
            MergeError, match="layers/kernel: 1 elements of a are NaN or Inf"
        ) as info:
            function(params, broken)
        assert "up/kernel" not in str(info.value)


def test_merge_refuses_a_whole_leaf_that_is_not_finite():
    params, adapter = toy()
    broken = jl.Adapter(adapter.pairs, {"up/bias": jnp.full(20, np.nan)}, adapter.config)
    with pytest.raises(MergeError, match="up/bias: 20 elements of the fully trained leaf"):
        merge(params, broken)


def test_merge_refuses_sums_beyond_float16():
    params = {"kernel": jnp.full((2, 2), 60000.0, jnp.float16)}
    pair = jl.LoraPair(jnp.full((2, 1), 100.0), jnp.full((1, 2), 100.0))
    adapter = jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=1))
    with pytest.raises(MergeError, match="kernel: 100.00% of the merged elements overflow"):
        merge(params, adapter)


def test_merge_warns_when_the_base_is_too_coarse_for_the_update():
    # Half a unit in the last place of 1.0 in bfloat16 is 2**-8; three quarters of the columns lie
    # under it.
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    b = jnp.array([[2.0**-7, 2.0**-10, 2.0**-10, 2.0**-10]])
    adapter = jl.Adapter({"kernel": jl.LoraPair(jnp.ones((4, 1)), b)}, {}, jl.LoraConfig(rank=1))
    with pytest.warns(
        MergeWarning, match=r"merge: kernel\s+got:\s+75.0% of the changed elements"
    ) as caught:
        merge(params, adapter)
    assert caught[0].filename == __file__  # points at the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge({"kernel": jnp.ones((4, 4), jnp.float32)}, adapter)


def test_an_adapter_that_does_not_fit_is_refused():
    params, adapter = toy()
    del params["up"]
    with pytest.raises(StructureError, match="up/kernel: not in the tree"):
        merge(params, adapter)


def test_merged_weights_stay_sharded_as_the_base_was():
    params, adapter = toy()
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params["up"]["kernel"] = jax.device_put(params["up"]["kernel"], sharding)
    merged = merge(params, adapter)["up"]["kernel"]
    assert merged.sharding == sharding
    want = double(params["up"]["kernel"]) + expected_delta(adapter.pairs["up/kernel"])
    np.testing.assert_allclose(double(merged), want, rtol=1e-6, atol=1e-6)


def test_a_donated_base_is_freed_leaf_by_leaf_and_shared_leaves_stay():
    params, adapter = toy()
    expected = merge(params, adapter)
    shared = {**params, "copy": params["up"]["kernel"]}
    merged = merge(shared, adapter, donate=True)
    for got, want in zip(
        jax.tree.leaves({k: merged[k] for k in expected}), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert params["layers"]["kernel"].is_deleted()
    assert not params["up"]["kernel"].is_deleted() and not params["up"]["bias"].is_deleted()


def test_a_donated_quantized_base_is_freed():
    params, adapter = toy()
    stored = jl.quantize(params, "int8", targets="up/kernel")
    expected = merge(stored, adapter)["up"]["kernel"]
    merged = merge(stored, adapter, donate=True)
    assert np.asarray(merged["up"]["kernel"]).tobytes() == np.asarray(expected).tobytes()
    assert stored["up"]["kernel"].arrays["codes"].is_deleted()


def test_a_stack_is_merged_layer_by_layer():
    layers, width = 16, 64
    base = jnp.ones((layers, width, width), jnp.bfloat16)
    pair = jl.LoraPair(
        jnp.ones((layers, width, 2)), jnp.ones((layers, 2, width)), (1,), (2,), (0,), 0.5
    )
    compiled = _merged_stack.lower(base, pair, sign=1).compile()
    memory = compiled.memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < 2 * base.size  # in float32: 4 * size
