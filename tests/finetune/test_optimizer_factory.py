import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.errors import ConfigError
from jax_lora.finetune.optimizer_factory import make_optimizer, optimizer_names


@pytest.fixture(autouse=True)
def promotion():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def adapter():
    fresh = jl.lora_init(jax.random.key(0), {"kernel": jnp.ones((3, 4))}, jl.LoraConfig(rank=2))
    return jax.tree.map(lambda leaf: leaf + jnp.full_like(leaf, 0.1), fresh)


def updated(adapter, **options):
    optimizer = make_optimizer(optax.constant_schedule(0.1), **options)
    ones = jax.tree.map(jnp.ones_like, adapter)
    updates, _ = optimizer.update(ones, optimizer.init(adapter), adapter)
    return updates.pairs["kernel"]


def test_an_unknown_optimizer_is_refused_with_suggestions():
    with pytest.raises(ConfigError, match=r"(?s)optimizer.*'adamv'.*Did you mean adam"):
        make_optimizer(optax.constant_schedule(0.1), name="adamv")


@pytest.mark.parametrize("name", ["lbfgs", "scale_by_adam", "chain", "__name__"])
def test_functions_that_are_not_optimizers_are_refused(name):
    with pytest.raises(ConfigError, match="an optimizer of Optax"):
        make_optimizer(optax.constant_schedule(0.1), name=name)


def test_the_common_optimizers_are_listed():
    assert {"adam", "adamw", "sgd", "lion", "adafactor", "lamb", "muon"} <= set(optimizer_names())


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_updates_an_adapter(adapter, name):
    optimizer = make_optimizer(optax.constant_schedule(0.1), name=name)
    state = optimizer.init(adapter)
    moved = adapter
    for _ in range(2):
        gradients = jax.tree.map(lambda leaf: leaf * 0.5 + 0.1, moved)
        updates, state = optimizer.update(gradients, state, moved)
        moved = optax.apply_updates(moved, updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    assert np.any(moved.pairs["kernel"].b != adapter.pairs["kernel"].b)


def test_weight_decay_is_passed_to_an_optimizer_that_supports_it(adapter):
    plain, decayed = (updated(adapter, name="adamw", weight_decay=decay) for decay in (0.0, 1.0))
    np.testing.assert_allclose(decayed.b - plain.b, -0.1 * adapter.pairs["kernel"].b, rtol=1e-5)


def test_weight_decay_is_refused_for_an_optimizer_without_it():
    with pytest.raises(ConfigError, match=r"(?s)weight_decay.*which has no weight decay.*adamw"):
        make_optimizer(optax.constant_schedule(0.1), name="adam", weight_decay=0.1)


def test_lora_plus_raises_the_learning_rate_of_b(adapter):
    pair = updated(adapter, name="sgd", max_grad_norm=0.0, lora_plus_ratio=16.0)
    np.testing.assert_allclose(pair.a, np.full((3, 2), -0.1), rtol=1e-6)
    np.testing.assert_allclose(pair.b, np.full((2, 4), -1.6), rtol=1e-6)
