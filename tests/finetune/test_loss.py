import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lora.data.batches import Batch, Batches
from jax_lora.data.examples import Example
from jax_lora.finetune.loss import summed_loss


def example(ids, learned):
    return Example(np.asarray(ids, np.int32), np.asarray(learned, bool), 1)


ROWS = [example([5, 9, 7, 3], [0, 0, 1, 1]), example([8, 2, 6, 4, 1, 0], [0, 1, 1, 1, 1, 1])]


def test_it_is_the_cross_entropy_of_the_learned_tokens(tiny):
    model, variables = tiny
    total, tokens = summed_loss(model, variables, Batches.of(ROWS, 2).at(0))
    expected = 0.0
    for row in ROWS:
        logits = model.apply(variables, jnp.asarray(row.ids)[None])[0, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(row.ids[1:]))
        expected += float(jnp.sum(losses * row.learned[1:].astype(np.float32)))
    assert float(tokens) == 7
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)


def test_a_batch_with_nothing_to_learn_has_loss_zero_and_zero_gradient(tiny):
    model, variables = tiny
    batch = Batches.of(ROWS, 2).at(0)
    nothing = batch._replace(weights=np.zeros_like(batch.weights))
    (total, tokens), gradient = jax.value_and_grad(
        lambda tree: summed_loss(model, tree, nothing), has_aux=True
    )(variables)
    assert float(total) == float(tokens) == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_padding_is_told_by_place_not_by_id(tiny):
    # The end token has id 0, as padding does; it is learned all the same.
    model, variables = tiny
    batch = Batches.of([ROWS[1]], 1).at(0)
    other = Batch(np.where(np.arange(8)[None] < 6, batch.ids, 77), *batch[1:])
    assert batch.labels[0, 4] == 0 and batch.weights[0, 4] == 1.0
    same = [float(summed_loss(model, variables, each)[0]) for each in (batch, other)]
    assert same[0] == same[1]


def test_parts_of_a_batch_add_up_whatever_their_lengths(tiny):
    model, variables = tiny
    whole = summed_loss(model, variables, Batches.of(ROWS, 2).at(0))
    parts = [summed_loss(model, variables, Batches.of([row], 1).at(0)) for row in ROWS]
    for index in range(2):
        added = float(parts[0][index]) + float(parts[1][index])
        np.testing.assert_allclose(added, float(whole[index]), rtol=1e-6)


def test_a_bfloat16_base_has_a_float32_loss(tiny):
    model, variables = tiny
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    total, _ = summed_loss(model, small, Batches.of(ROWS, 2).at(0))
    assert total.dtype == jnp.float32
