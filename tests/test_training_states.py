"""Adapters and combined trees in common training states: Flax, pickle, Orbax."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import jax_lora as jl
from tests.lora_cases import assert_bitwise, random_tree, randomized

PARAMS = random_tree(
    {"up": {"kernel": (6, 8)}, "down": {"kernel": (8, 5), "bias": (5,)}, "embed": (9, 6)}
)


def model(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"] + p["down"]["bias"][None]


def full_adapter(**config):
    """An adapter with every kind of update."""
    settings = jl.LoraConfig(rank=2, targets=["up", "down"], modules_to_save=["bias"], **config)
    adapter = randomized(jl.lora_init(jax.random.key(0), PARAMS, settings))
    rows = jl.TokenRows(random_tree((2, 6), 5), (3, 7))
    return jl.Adapter(adapter.pairs, adapter.whole, adapter.config, {"embed": rows})


def states():
    adapter = full_adapter(use_dora=True)
    combined = jl.combine(PARAMS, adapter)
    dropping = jl.combine(PARAMS, full_adapter(dropout=0.5))
    tx = jl.masked_optimizer(optax.adam(1e-3))
    create = lambda params, tx: TrainState.create(apply_fn=None, params=params, tx=tx).replace(  # noqa: E731
        step=jnp.zeros((), jnp.int32)
    )
    return {
        "an adapter": adapter,
        "a combined tree": combined,
        "with dropout keys": jl.dropout(dropping, jax.random.PRNGKey(1)),
        "a quantized base": jl.combine(jl.quantize(PARAMS, "int8", targets="up"), full_adapter()),
        "a TrainState of a combined tree": create(combined, tx),
        "a TrainState of an adapter": create(adapter, optax.adam(1e-3)),
    }  # fmt: skip


STATES = states()


@pytest.mark.parametrize("name", STATES)
def test_flax_serialization_gives_the_state_back(name):
    state = STATES[name]
    zeros = jax.tree.map(jnp.zeros_like, state)
    assert_bitwise(serialization.from_bytes(zeros, serialization.to_bytes(state)), state)


def test_a_state_of_other_fields_is_refused_by_their_names():
    adapter = full_adapter()
    state = serialization.to_state_dict(adapter)
    del state["pairs"]["up/kernel"]["b"]
    with pytest.raises(ValueError, match="LoraPair has the fields a, b; the state differs in b"):
        serialization.from_state_dict(adapter, state)


@pytest.mark.parametrize("name", ["an adapter", "a combined tree", "a quantized base"])
def test_pickle_gives_the_state_back(name):
    state = STATES[name]
    assert_bitwise(pickle.loads(pickle.dumps(jax.device_get(state))), jax.device_get(state))


@pytest.mark.parametrize("name", ["an adapter", "a combined tree", "a quantized base"])
def test_orbax_gives_the_state_back(name, tmp_path):
    state = STATES[name]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        assert_bitwise(checkpointer.restore(tmp_path / "state", like), state)


def test_a_train_state_of_an_adapter_trains():
    adapter = full_adapter()
    x = random_tree((4, 6), 2)
    with_lora = jl.lora_apply(model)
    state = TrainState.create(apply_fn=with_lora, params=adapter, tx=optax.sgd(1e-4))
    loss = lambda a: ((with_lora(jl.combine(PARAMS, a), x) - 1.0) ** 2).mean()  # noqa: E731
    before = loss(state.params)
    for _ in range(3):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    assert loss(state.params) < before


def test_an_adapter_lists_its_paths():
    adapter = full_adapter()
    assert [*adapter] == ["down/kernel", "up/kernel", "down/bias", "embed"]
    assert "up/kernel" in adapter and "params" not in adapter


def test_the_updates_of_an_adapter_make_it_again():
    adapter = full_adapter(use_dora=True)
    again = jl.Adapter.of(adapter.updates, adapter.config)
    assert_bitwise(again, adapter)


def test_merged_weights_of_uncommitted_arrays_stay_uncommitted():
    adapter = full_adapter()
    pairs = jl.Adapter(adapter.pairs, {}, adapter.config)
    merged = jl.merge(PARAMS, pairs)
    assert not any(leaf.committed for leaf in jax.tree.leaves((merged, jl.unmerge(merged, pairs))))
    there = jax.device_put(PARAMS, jax.devices()[3])
    pairs = jax.device_put(pairs, jax.devices()[3])
    devices = {
        device for leaf in jax.tree.leaves(jl.merge(there, pairs)) for device in leaf.devices()
    }
    assert devices == {jax.devices()[3]}
    np.testing.assert_array_equal(merged["embed"], PARAMS["embed"])
