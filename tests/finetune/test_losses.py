import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lora.data.batches import Batches
from jax_lora.data.collators import Batch
from jax_lora.data.examples import Example
from jax_lora.finetune import losses
from jax_lora.finetune.losses import causal_lm_loss
from tests.lora_cases import equations


def loss_of(model, variables, batch, **options):
    """`causal_lm_loss` as one compiled function: alone, each operation would be compiled."""
    return jax.jit(functools.partial(causal_lm_loss, model, **options))(variables, batch)


def example(ids, learned):
    return Example(np.asarray(ids, np.int32), np.asarray(learned, bool), 1)


ROWS = [example([5, 9, 7, 3], [0, 0, 1, 1]), example([8, 2, 6, 4, 1, 0], [0, 1, 1, 1, 1, 1])]


def test_the_loss_is_the_cross_entropy_of_the_target_tokens(tiny):
    model, variables = tiny
    total, tokens = loss_of(model, variables, Batches.of(ROWS, 2).at(0))

    @jax.jit
    def by_row(variables):
        sums = []
        for row in ROWS:
            logits = model.apply(variables, row.ids[None])[0, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, row.ids[1:])
            sums.append(jnp.sum(losses * row.loss_mask[1:].astype(np.float32)))
        return sums

    assert float(tokens) == 7
    np.testing.assert_allclose(float(total), sum(map(float, by_row(variables))), rtol=1e-5)


def test_a_batch_without_targets_has_zero_loss_and_gradient(tiny):
    model, variables = tiny
    batch = Batches.of(ROWS, 2).at(0)
    nothing = batch._replace(weights=np.zeros_like(batch.weights))
    loss = functools.partial(causal_lm_loss, model, batch=nothing)
    (total, tokens), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    assert float(total) == float(tokens) == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_padding_is_recognized_by_position_and_not_by_id(tiny):
    # The end token has id 0, as padding does; it is learned all the same.
    model, variables = tiny
    batch = Batches.of([ROWS[1]], 1).at(0)
    other = Batch(np.where(np.arange(8)[None] < 6, batch.ids, 77), *batch[1:])
    assert batch.labels[0, 4] == 0 and batch.weights[0, 4] == 1.0
    same = [float(loss_of(model, variables, each)[0]) for each in (batch, other)]
    assert same[0] == same[1]


def test_the_losses_of_parts_add_up_for_any_lengths(tiny):
    model, variables = tiny
    whole = loss_of(model, variables, Batches.of(ROWS, 2).at(0))
    parts = [loss_of(model, variables, Batches.of([row], 1).at(0)) for row in ROWS]
    for index in range(2):
        added = float(parts[0][index]) + float(parts[1][index])
        np.testing.assert_allclose(added, float(whole[index]), rtol=1e-6)


def test_a_bfloat16_base_has_a_float32_loss(tiny):
    model, variables = tiny
    small = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), variables)
    total, _ = loss_of(model, small, Batches.of(ROWS, 2).at(0))
    assert total.dtype == jnp.float32


def test_chunked_logits_give_the_same_loss_and_gradient(tiny):
    model, variables = tiny
    batch = Batches.of(ROWS, 2).at(0)

    @jax.jit
    def by_chunk(variables):
        loss = lambda tree, chunk: causal_lm_loss(model, tree, batch, chunk=chunk)[0]  # noqa: E731
        return [jax.value_and_grad(loss)(variables, chunk) for chunk in (0, 1, 3, 8)]

    (value, gradient), *others = by_chunk(variables)
    for other, same in others:
        np.testing.assert_allclose(value, other, rtol=1e-6)
        for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_large_logits_are_never_in_memory_as_a_whole(tiny, monkeypatch):
    model, variables = tiny
    batch = Batches.of([example(range(64), np.ones(64))] * 2, 2).at(0)

    def largest():
        program = jax.make_jaxpr(jax.grad(lambda tree: causal_lm_loss(model, tree, batch)[0]))
        shapes = [
            var.aval.shape for eqn in equations(program(variables).jaxpr) for var in eqn.outvars
        ]
        vocabulary = model.config.vocab_size
        return max(shape[0] for shape in shapes if len(shape) == 2 and shape[1] == vocabulary)

    assert largest() == 128
    monkeypatch.setattr(losses, "MOST_LOGITS", 16 * model.config.vocab_size)
    assert largest() == 16


def test_packed_examples_do_not_attend_to_each_other(tiny):
    model, variables = tiny
    apart, _ = loss_of(model, variables, Batches.of(ROWS, 2).at(0))
    ids = np.concatenate([row.ids for row in ROWS])[None]
    learned = np.concatenate([row.loss_mask for row in ROWS])
    at = np.flatnonzero(learned[1:])[None]
    packed = Batch(
        ids=ids,
        at=at.astype(np.int32),
        labels=ids[:, at[0] + 1],
        weights=np.ones(at.shape, np.float32),
        positions=np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]], np.int32),
        segments=np.array([[1] * 4 + [2] * 6], np.int32),
    )
    together, tokens = loss_of(model, variables, packed)
    assert float(tokens) == 7
    np.testing.assert_allclose(float(together), float(apart), rtol=1e-5)
