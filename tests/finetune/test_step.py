import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora import LoraConfig, find_kernels, lora_init
from jax_lora.data.batches import Batches
from jax_lora.data.examples import Example
from jax_lora.dropout import dropout
from jax_lora.finetune.optimizer_factory import make_optimizer
from jax_lora.finetune.step import init_state, make_step
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
    return jax.tree.map(lambda leaf: leaf + jnp.full_like(leaf, 0.01), fresh)


def one_update(tiny, adapter, accumulation, wrap=None):
    model, variables = tiny
    optimizer = optax.sgd(1.0)
    step = make_step(
        loss_for(CAUSAL, model),
        optimizer,
        accumulation=accumulation,
        transform=wrap,
    )
    batch = Batches.of(examples(), 8, buckets=1).at(0)
    return step(init_state(adapter, optimizer), variables, batch)


@pytest.mark.slow
def test_gradient_accumulation_gives_the_update_of_the_whole_batch(tiny, adapter):
    whole, report = one_update(tiny, adapter, 1)
    for parts in (2, 8):
        same, reported = one_update(tiny, adapter, parts)
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
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.trainable, adapter)
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow
def test_dropout_changes_the_update_and_depends_on_the_step(tiny, adapter):
    key = jax.random.key(1)
    wrap = lambda combined, step: dropout(combined, jax.random.fold_in(key, step))  # noqa: E731
    plain = one_update(tiny, adapter, 1)[1].loss
    dropped = one_update(tiny, adapter, 1, wrap)[1].loss
    assert float(plain) != float(dropped)
    assert float(dropped) == float(one_update(tiny, adapter, 1, wrap)[1].loss)


def test_training_lowers_the_training_loss(tiny, adapter):
    model, variables = tiny
    optimizer = make_optimizer(optax.constant_schedule(0.03))
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
    assert float(total) / float(tokens) < losses[0] - 0.3


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
