import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora import LoraConfig, find_kernels, lora_init
from jax_lora.data.batches import Batches
from jax_lora.data.examples import Example
from jax_lora.finetune.optimizer_factory import make_optimizer
from jax_lora.finetune.step import dropout_transform, init_state, make_step
from jax_lora.finetune.tasks import CAUSAL, loss_for
from jax_lora.finetune.validation import make_validation


@pytest.fixture(autouse=True)
def promotion():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


SIZES = (9, 4, 7, 6, 8, 5, 3, 8)


def examples():
    ids = np.random.default_rng(0).integers(1, 300, (len(SIZES), 9), dtype=np.int32)
    rows = zip(ids, SIZES, strict=True)
    return [Example(row[:n], np.arange(n) >= n // 2, 1) for row, n in rows]


@pytest.fixture(scope="module")
def adapter(tiny):
    model, variables = tiny
    kernels = find_kernels(model.apply, variables, jnp.zeros((1, 4), jnp.int32))
    config = LoraConfig(rank=2, dropout=0.5)
    fresh = lora_init(jax.random.key(0), variables, config, kernels=kernels)
    # b is zero at the start, where the gradient of a would be zero too.
    return jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.01), fresh)


@functools.cache
def step_of(model, accumulation, drops):
    """A step that all tests share, and its optimizer."""
    optimizer = optax.sgd(1.0)
    transform = dropout_transform(0.5, seed=1) if drops else None
    loss = loss_for(CAUSAL, model)
    return make_step(loss, optimizer, accumulation=accumulation, transform=transform), optimizer


def one_update(tiny, adapter, accumulation, *, drops=False, number=0):
    model, variables = tiny
    step, optimizer = step_of(model, accumulation, drops)
    batch = Batches.of(examples(), 8, buckets=1).at(0)
    state = init_state(adapter, optimizer)._replace(step=jnp.int32(number))
    return step(state, variables, batch)


@pytest.mark.slow
def test_gradient_accumulation_gives_the_update_of_the_whole_batch(tiny, adapter):
    whole, report = one_update(tiny, adapter, 1)
    same, reported = one_update(tiny, adapter, 4)
    np.testing.assert_allclose(float(reported.loss), float(report.loss), rtol=1e-6)
    for one, other in zip(
        jax.tree.leaves(whole.trainable), jax.tree.leaves(same.trainable), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_only_the_adapter_changes_and_the_step_counter_rises(tiny, adapter):
    _, variables = tiny
    before = jax.tree.map(np.asarray, variables)
    state, _ = one_update(tiny, adapter, 1)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    assert int(state.step) == 1
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.trainable, adapter)
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow
def test_dropout_changes_the_update_and_depends_on_the_step(tiny, adapter):
    plain = one_update(tiny, adapter, 1)[1].loss
    first, again, second = (
        float(one_update(tiny, adapter, 1, drops=True, number=number)[1].loss)
        for number in (0, 0, 1)
    )
    assert first == again
    assert len({float(plain), first, second}) == 3


def test_training_lowers_the_training_loss(tiny, adapter):
    model, variables = tiny
    optimizer = make_optimizer(optax.constant_schedule(0.003))
    step, measure = (
        make_step(loss_for(CAUSAL, model), optimizer),
        make_validation(loss_for(CAUSAL, model)),
    )
    batch = Batches.of(examples(), 8, buckets=1).at(0)
    state, losses = init_state(adapter, optimizer), []
    for _ in range(60):
        state, report = step(state, variables, batch)
        losses.append(float(report.loss))
    total, tokens = measure(state.trainable, variables, batch)
    assert float(total) / float(tokens) < losses[0] - 0.8


def test_the_gradient_is_clipped_by_its_norm():
    clipped, free = (
        make_optimizer(optax.constant_schedule(1.0), max_grad_norm=norm) for norm in (1.0, 0.0)
    )
    tree = {"a": jnp.ones(3)}
    huge = {"a": jnp.full(3, 1e30)}  # squared, it would overflow Adam's second moment
    for each, finite in ((clipped, True), (free, False)):
        _, moments = each.update(huge, each.init(tree), tree)
        leaves = [leaf for leaf in jax.tree.leaves(moments) if leaf.dtype == jnp.float32]
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves) == finite
