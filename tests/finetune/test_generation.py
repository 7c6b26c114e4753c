import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.errors import ConfigError
from jax_lora.finetune.generation import Generator

PROMPTS = [[5, 9, 7], [200, 3], [8, 2, 6, 4, 1, 90, 17, 33, 250]]


def slowly(model, variables, prompt, stops, most):
    """The definition: score the whole text again for every token."""
    ids, answer = list(prompt), []
    score = jax.jit(model.apply)
    for _ in range(most):
        padded = jnp.asarray([ids + [0] * (16 - len(ids))])  # one shape to compile
        token = int(np.argmax(score(variables, padded)[0, len(ids) - 1]))
        if token in stops:
            break
        ids.append(token)
        answer.append(token)
    return answer


@pytest.fixture
def generator(tiny, tokenizer):
    return Generator(*tiny, tokenizer, max_tokens=6, rows=4)


def test_unequal_prompts_together_are_answered_as_each_alone(tiny, tokenizer, generator):
    model, variables = tiny
    expected = [
        tokenizer.decode(slowly(model, variables, prompt, {tokenizer.eos_id}, 6))
        for prompt in PROMPTS
    ]
    assert generator.answer(PROMPTS) == expected
    assert len(set(expected)) == 3


def test_more_prompts_than_rows_come_back_in_their_order(generator):
    alone = [generator.answer([prompt])[0] for prompt in PROMPTS]
    assert generator.answer(PROMPTS * 3) == alone * 3


def test_an_answer_ends_at_any_end_token_of_the_model(tiny, tokenizer, generator):
    model, variables = tiny
    answer = slowly(model, variables, PROMPTS[0], {tokenizer.eos_id}, 6)
    assert len(answer) > 2
    ends = dataclasses.replace(model.config, eos_token_id=(0, answer[2]))
    stopped = dataclasses.replace(generator, model=model.clone(config=ends))
    first = answer.index(answer[2])
    assert stopped.answer(PROMPTS[:1]) == [tokenizer.decode(answer[:first])]


def test_an_answer_of_one_line_ends_before_the_new_line(tokenizer, generator):
    line = dataclasses.replace(generator, stop_at_newline=True)
    assert line._stop_mask[tokenizer.encode("\n")[0]]
    assert not generator._stop_mask[tokenizer.encode("\n")[0]]
    assert all("\n" not in answer for answer in line.answer(PROMPTS))


@pytest.mark.parametrize("prompt", [[], [1] * 123])
def test_a_prompt_that_leaves_no_room_is_refused(generator, prompt):
    with pytest.raises(ConfigError, match="no more than the model's 128 together"):
        generator.answer([prompt])
