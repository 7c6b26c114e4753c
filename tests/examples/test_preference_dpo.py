"""The example preference_dpo.py."""

import contextlib
import io

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
    """The model, its parameters, two pairs and a new adapter."""
    model, params = jl.models.load(model_path(), dtype="float32")
    variables = {"params": params}
    pairs = script.make_pairs("valid", Tokenizer.load(model_path()), 2)
    kernels = jl.find_kernels(model.apply, variables, pairs.ids[0])
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=2), kernels=kernels)
    return model, variables, pairs, adapter


@pytest.fixture(scope="module")
def differentiated(script, small):
    """An adapter without a zero, its loss with the rest, and gradients of adapter and base."""
    model, variables, pairs, adapter = small
    moved = randomized(adapter)
    loss = jax.value_and_grad(script.make_loss(model, 0.1), (0, 1), has_aux=True)
    return moved, *jax.jit(loss)(moved, variables, pairs)


@pytest.fixture(scope="module")
def finished(script):
    """The scores of a short run, what it prints, and its step: arguments, and compiled."""
    made, step, printed = script.make_step, [], io.StringIO()

    def make_step(*given):
        jitted = made(*given)

        def compiled(*arguments):
            if not step:
                step[:] = arguments, jitted.lower(*arguments).compile()
            return step[1](*arguments)

        return compiled

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(script, "make_step", make_step)
        scores = script.run(steps=16, rank=4, beta=0.1, most=200)
    return scores, printed.getvalue(), *step


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (" select a from t where b >= 3", " select a from t where b <= 3"),
        (" select a from t where b < 3", " select a from t where b > 3"),
        (" select max( a ) from t where b = 'c'", " select min( a ) from t where b = 'c'"),
        (" select a from t order by b", " select a from t order by b desc"),
        (" select a from t order by b desc limit 8", " select a from t order by b limit 8"),
    ],
)
def test_reversing_a_query_twice_restores_it(script, right, wrong):
    assert script.reversed_query(right) == wrong and script.reversed_query(wrong) == right


def test_a_query_without_order_is_unchanged(script):
    query = " select a, count(*) from t where b != 'max of desc' group by a"
    assert script.reversed_query(query) == query


def test_both_responses_have_the_same_prompt(script, small):
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
        assert chosen.startswith(" select") and script.reversed_query(chosen) == rejected != chosen


def test_no_question_is_in_both_splits(script):
    tokenizer = Tokenizer.load(model_path())
    training, held_out = (
        {row.tobytes() for row in script.make_pairs(split, tokenizer, 1000).ids[:, 0]}
        for split in ("train", "test")
    )
    assert len(training) > 500 and len(held_out) > 50
    assert not training & held_out


def test_the_loss_is_equation_7_in_float64(script):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-20, 5, (2, 6, 2))
    ratio = policy - reference
    margin = 0.3 * (ratio[:, 0] - ratio[:, 1])
    expected = np.mean(np.log1p(np.exp(-margin)))
    value, margins = script.dpo_loss(jnp.float32(policy), jnp.float32(reference), 0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(margins, margin, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_equals_the_reference(script, small):
    model, variables, pairs, adapter = small
    value, (margin, _) = jax.jit(script.make_loss(model, 0.1))(adapter, variables, pairs)
    assert (margin == 0).all()  # to the bit
    assert value == np.float32(np.log(2))


def test_log_probabilities_are_sums_over_response_tokens(script, small):
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


@pytest.mark.slow
def test_the_reference_does_not_depend_on_the_adapter(script, small, differentiated):
    model, variables, pairs, _ = small
    moved, (_, (margin, policy)), _ = differentiated
    ids, answer = (jnp.asarray(each).reshape(-1, script.LENGTH) for each in pairs)
    with_it, without = (
        script.log_probability(jax.jit(model.apply)(weights, ids), ids, answer).reshape(-1, 2)
        for weights in (jl.merge(variables, moved), variables)
    )
    expected = script.dpo_loss(with_it, without, 0.1)[1]
    np.testing.assert_allclose(policy, with_it, rtol=1e-4)
    np.testing.assert_allclose(margin, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_only_the_adapter_has_a_gradient(differentiated):
    of_adapter, of_base = differentiated[-1]
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_base))  # norms and head included
    assert all(leaf.any() for leaf in jax.tree.leaves(of_adapter))


@pytest.mark.slow
def test_a_step_has_one_copy_of_the_base(finished):
    given, step = finished[2:]
    memory = step.memory_analysis()
    assert memory is not None
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(each)) for each in given]
    # Buffers are aligned, which costs some bytes each; a second base would be 17 million more.
    assert 0 <= memory.argument_size_in_bytes - sum(sizes) < 0.01 * sizes[2]
    assert memory.output_size_in_bytes < 0.2 * sizes[2]


@pytest.mark.slow
def test_it_learns_held_out_preferences(finished):
    (before, after), said, *_ = finished
    assert before.margin == before.rewarded_more == 0
    np.testing.assert_allclose(before.loss, np.log(2), rtol=1e-6)  # a mean over 52 pairs rounds
    assert after.loss < 0.65 and after.margin > 0.2 and after.rewarded_more > 0.5
    assert "200 training preferences, 52 held out" in said  # every test pair that fits
    assert "17.6 MB of parameters: base 17.2 MB, adapter 0.4 MB" in said
    assert "with a separate reference model: 34.7 MB" in said
