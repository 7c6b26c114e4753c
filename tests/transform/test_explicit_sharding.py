"""Shardings in types: in every form, the result has the sharding of the model's product."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_lora as jl
from jax_lora.transform.strategies import FORMS
from tests.lora_cases import assert_close, randomized

P = PartitionSpec


def model(params, x):
    return jnp.tanh(jnp.einsum("bsd,dk->bsk", x, params["kernel"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "w_spec, b_spec",
    [(P(), P()), (P(None, "model"), P()), (P(None, "model"), P(None, "model"))],
)
def test_results_and_gradients_are_the_merged_ones(w_spec, b_spec, form):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    config = jl.LoraConfig(rank=2, targets=["kernel"])
    with jax.sharding.set_mesh(mesh):
        put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
        params = {"kernel": put(jax.random.normal(jax.random.key(1), (6, 8)), w_spec)}
        x = put(jax.random.normal(jax.random.key(2), (2, 5, 6)), P("data"))
        plain = {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
        adapter = randomized(jl.lora_init(jax.random.key(0), plain, config))
        a, b = adapter.pairs["kernel"].a, put(adapter.pairs["kernel"].b, b_spec)
        scale = adapter.pairs["kernel"].scale

        def ours(a, b):
            pair = jl.LoraPair(a, b, scale=scale)
            adapted = jl.combine(params, jl.Adapter({"kernel": pair}, {}, config))
            return jl.lora_apply(model, on_materialize="error", form=form)(adapted, x)

        def theirs(a, b):
            kernel = jax.sharding.reshard(params["kernel"], P())
            delta = scale * a @ jax.sharding.reshard(b, P())
            return model({"kernel": jax.sharding.reshard(kernel + delta, w_spec)}, x)

        derivatives = lambda f: jax.value_and_grad(lambda *ab: (f(*ab) ** 2).sum(), (0, 1))(a, b)  # noqa: E731
        got, want = jax.jit(lambda: (derivatives(ours), derivatives(theirs)))()
        assert jax.typeof(ours(a, b)).sharding == jax.typeof(model(params, x)).sharding
    assert_close(got, want, 1e-4)
