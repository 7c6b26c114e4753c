"""The example of DPO: its loss, its reference, and that held-out preferences come out first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.data.tokenizer import Tokenizer
from tests.lora_cases import randomized


@pytest.fixture(scope="module")
def small(script):
    """The model, its parameters, two pairs and an adapter at its start."""
    model, params = jl.models.load(model_path(), dtype="float32")
    variables = {"params": params}
    pairs = script.make_pairs("valid", Tokenizer.load(model_path()), 2)
    kernels = jl.find_kernels(model.apply, variables, pairs.ids[0])
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=2), kernels=kernels)
    return model, variables, pairs, adapter


def test_keywords_are_in_capitals_but_not_names_and_values(script):
    query = " select model from orders where name = 'war and peace' order by price desc"
    expected = " SELECT model FROM orders WHERE name = 'war and peace' ORDER BY price DESC"
    assert script.shout(query) == expected


def test_both_answers_of_a_pair_follow_the_same_question(script, small):
    _, _, (ids, answer), _ = small
    tokenizer = Tokenizer.load(model_path())
    for both, of in zip(ids, answer, strict=True):
        questions = [
            tokenizer.decode(row[: at.argmax()].tolist()) for row, at in zip(both, of, strict=True)
        ]
        assert questions[0] == questions[1] and questions[0].endswith("sql:")
        chosen, rejected = (
            tokenizer.decode(row[at].tolist()) for row, at in zip(both, of, strict=True)
        )
        assert "SELECT" in chosen and chosen.lower() == rejected.lower() != chosen


def test_the_loss_is_equation_7_in_float64(script):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-20, 5, (2, 6, 2))
    ratio = policy - reference
    margin = 0.3 * (ratio[:, 0] - ratio[:, 1])
    expected = np.mean(np.log1p(np.exp(-margin)))
    value, margins = script.dpo_loss(jnp.float32(policy), jnp.float32(reference), 0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(margins, margin, rtol=1e-4, atol=1e-5)


def test_at_the_start_policy_and_reference_are_one_model(script, small):
    model, variables, pairs, adapter = small
    value, margin = jax.jit(script.make_loss(model, 0.1))(adapter, variables, pairs)
    assert (margin == 0).all()  # to the bit
    assert value == -jax.nn.log_sigmoid(jnp.float32(0))


def test_log_probabilities_are_sums_over_the_answers_tokens(script, small):
    model, variables, pairs, _ = small
    ids, answer = pairs.ids[0], pairs.answer[0]  # (2, LENGTH)
    logits = model.apply(variables, ids)
    found = script.log_probability(logits, jnp.asarray(ids), jnp.asarray(answer))
    of_token = np.float64(jax.nn.log_softmax(logits))  # (2, LENGTH, vocabulary)
    by_hand = [
        sum(of_token[row, place - 1, ids[row, place]] for place in np.flatnonzero(answer[row]))
        for row in range(2)
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)


def test_the_reference_knows_nothing_of_the_adapter(script, small):
    model, variables, pairs, adapter = small
    moved = randomized(adapter)
    _, margin = script.make_loss(model, 0.1)(moved, variables, pairs)
    ids, answer = (jnp.asarray(each).reshape(-1, script.LENGTH) for each in pairs)
    with_it, without = (
        script.log_probability(model.apply(weights, ids), ids, answer).reshape(-1, 2)
        for weights in (jl.merge(variables, moved), variables)
    )
    expected = script.dpo_loss(with_it, without, 0.1)[1]
    np.testing.assert_allclose(margin, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_held_out_preferences_come_out_first(script, capsys):
    found = script.run(steps=8, rank=4, beta=0.1, most=64)
    assert found["before"][1:] == [0.0, 0.0]
    assert found["after"][0] < 0.6 and found["after"][2] > 0.9
    assert "base 17.2 MB, once, and adapter" in capsys.readouterr().out
