"""The target platform is determined once, at the outermost call; shapes may be symbolic."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jax_lora as jl
from jax_lora.errors import ConfigError
from jax_lora.transform import strategies
from jax_lora.transform.strategies import Strategy
from tests.lora_cases import adapt, assert_close, merged_tree, random_tree

TREE = random_tree({"up": (64, 64), "down": (64, 32)})


def model(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


X = random_tree((2, 256, 64), 3)
LORA = jl.combine(TREE, adapt(model, TREE, X))


def traced(**options):
    """The program for a target, as text."""
    return str(jax.make_jaxpr(jl.lora_apply(model, **options))(LORA, X))


def test_another_target_than_this_host_gets_its_own_choices():
    assert "custom_jvp" in traced()  # float32 on a CPU: merged
    assert "custom_jvp" not in traced(platform="gpu")
    assert traced(platform="tpu") == traced(platform="gpu") != traced(platform="cpu")


def test_tokens_are_flattened_for_a_cpu_alone():
    flat = "f32[1,512,64]"  # (batch, sequence) as one axis, behind the batch of 1
    assert flat in traced(platform="cpu", form="factored")
    assert flat not in traced(platform="gpu", form="factored")


def test_other_names_of_a_gpu_are_the_same_target():
    assert traced(platform="cuda") == traced(platform="gpu")


def test_an_unknown_platform_is_refused():
    with pytest.raises(ConfigError, match="lora_apply: platform\n  got:      'npu'"):
        jl.lora_apply(model, platform="npu")


def test_the_default_is_where_the_inputs_lie_else_the_default_backend():
    assert strategies.target_platform([X]) == "cpu"
    assert strategies.target_platform([]) == jax.default_backend()


def test_nothing_but_the_outermost_call_asks_for_the_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the backend"))
    traced(platform="tpu")


@pytest.mark.parametrize("platform", strategies.PLATFORMS)
def test_every_target_computes_the_same(platform):
    got = jl.lora_apply(model, platform=platform)(LORA, X)
    tree, adapter = jl.partition(LORA)
    assert_close(got, model(merged_tree(tree, adapter), X), 1e-5)


def test_a_sharded_operand_is_not_flattened():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    there = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, jax.P("d")))
    assert Strategy("cpu").flattens(jnp.ones((4, 4)))
    assert not Strategy("cpu").flattens(jnp.ones((4, 4)), there)


@pytest.mark.parametrize("form", strategies.FORMS)
def test_a_symbolic_batch_is_exported_and_runs_at_any_size(form):
    batch, tokens = export.symbolic_shape("batch, tokens")
    shape = jax.ShapeDtypeStruct((batch, tokens, 64), jnp.float32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), LORA)
    run = jax.jit(lambda tree, x: jl.lora_apply(model, form=form)(tree, x))
    leaves, treedef = jax.tree.flatten(shapes)
    flat = jax.jit(lambda leaves, x: run(jax.tree.unflatten(treedef, leaves), x))
    exported = export.export(flat)(leaves, shape)
    for x in (X, X[:1, :7]):
        assert_close(exported.call(jax.tree.leaves(LORA), x), run(LORA, x), 1e-5)


def test_kernels_are_found_at_symbolic_shapes():
    batch, tokens = export.symbolic_shape("batch, tokens")
    x = jax.ShapeDtypeStruct((batch, tokens, 64), jnp.float32)
    kernels = jl.find_kernels(lambda p, x: model(p, x) + x[..., :32], TREE, x)
    assert {*kernels} == {"up", "down"} and not kernels.skipped
