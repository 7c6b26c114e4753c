import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jax_lora as jl
from jax_lora.checkpoint.fingerprint import differences, fingerprint


def base(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "up": {"kernel": jnp.asarray(draw.normal(size=(40, 64)), jnp.float32)},
        "down": {"kernel": jnp.asarray(draw.normal(size=(3, 64, 40)), jnp.bfloat16)},
        "step": jnp.int32(seed),
        "empty": jnp.zeros((0, 4)),
        "numpy": draw.integers(0, 9, (5,), np.int8),
        "key": jax.random.key(seed),
    }


def test_the_same_model_has_no_differences():
    assert differences(fingerprint(base()), base()) == {}


def test_other_values_shapes_types_and_paths_are_all_told():
    then, now = fingerprint(base()), base()
    now["up"]["kernel"] = now["up"]["kernel"].T
    now["down"]["kernel"] = now["down"]["kernel"].astype(jnp.float32)
    now["step"] = jnp.int32(7)
    del now["numpy"]
    now["extra"] = jnp.zeros(2)
    assert differences(then, now) == {
        "down/kernel": "has dtype float32, was saved with bfloat16",
        "extra": "not in the saved base model",
        "numpy": "not in this base model",
        "step": "has different values",
        "up/kernel": "has shape (64, 40), was saved with (40, 64)",
    }


def test_a_shifted_or_permuted_leaf_has_another_fingerprint():
    kernel = base()["up"]["kernel"]
    then = fingerprint({"kernel": kernel})
    for other in (kernel + 1e-3, kernel[::-1], kernel[:, ::-1], jnp.roll(kernel, 1, axis=0)):
        assert differences(then, {"kernel": other}) == {"kernel": "has different values"}


def test_shapes_alone_are_compared_with_an_abstract_base():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base())
    assert differences(fingerprint(base()), shapes) == {}
    assert differences(fingerprint(shapes), base(seed=1)) == {}


def test_adapters_in_the_tree_are_left_out():
    params = {"kernel": jnp.ones((3, 4))}
    adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
    assert fingerprint(jl.combine(params, adapter)) == fingerprint(params)


@pytest.mark.parametrize(
    "spec", [("x", "y"), ("y", "x"), (None, "x"), (("x", "y"), None), (None, None)]
)
def test_sharding_does_not_change_the_fingerprint(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kernel = base()["up"]["kernel"]
    sharded = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(*spec)))
    assert fingerprint({"kernel": sharded}) == fingerprint({"kernel": kernel})
    assert fingerprint({"kernel": np.asarray(kernel)}) == fingerprint({"kernel": kernel})
