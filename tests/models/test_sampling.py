from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.models.sampling import Choice, draw, filter_logits

FIXTURE = load_file(Path(__file__).parents[1] / "fixtures/generation/filters.safetensors")
LOGITS = FIXTURE["4/logits"]
EVERY = 1 << 30  # top-k of more than a vocabulary


@pytest.mark.parametrize("number", range(len(FIXTURE["settings"])))
def test_the_tokens_left_and_their_probabilities_are_those_of_transformers(number):
    temperature, top_k, top_p = FIXTURE["settings"][number].tolist()
    kept = filter_logits(
        jnp.asarray(FIXTURE[f"{number}/logits"]),
        jnp.float32(temperature),
        jnp.int32(top_k or EVERY),
        jnp.float32(top_p),
    )
    ours, theirs = jax.nn.softmax(kept, axis=-1), FIXTURE[f"{number}/left"]
    np.testing.assert_array_equal(np.asarray(ours) > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def test_one_token_is_always_left():
    kept = filter_logits(jnp.zeros((1, 8)), jnp.float32(1), jnp.int32(8), jnp.float32(1e-9))
    assert jnp.isfinite(kept).sum() == 1


def test_a_token_that_cannot_come_stays_out_when_nothing_is_cut():
    logits = jnp.array([[0.0, -jnp.inf, 1.0]])
    kept = filter_logits(logits, jnp.float32(1), jnp.int32(EVERY), jnp.float32(1))
    assert jnp.isfinite(kept).tolist() == [[True, False, True]]


def choice(keys, temperature=1.0, top_k=EVERY, top_p=1.0):
    return Choice(keys, jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def test_draws_follow_the_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    drawn = draw(jnp.tile(logits, (4000, 1)), choice(keys, top_p=0.85), jnp.int32(0))
    shares = np.bincount(drawn, minlength=4) / 4000
    # Of four thousand, a share is within 0.03 of what is expected but once in ten thousand times.
    np.testing.assert_allclose(shares, [0, 2 / 9, 3 / 9, 4 / 9], atol=0.03)


def test_samples_of_a_sequence_do_not_depend_on_the_rest_of_the_batch():
    keys = jax.random.split(jax.random.key(1), 6)
    together = draw(jnp.asarray(LOGITS), choice(keys), jnp.int32(3))
    for row in range(6):
        alone = draw(jnp.asarray(LOGITS[row : row + 1]), choice(keys[row : row + 1]), jnp.int32(3))
        assert alone[0] == together[row]
    assert len(set(together.tolist())) > 1
