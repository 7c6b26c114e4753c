import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_lora import LoraConfig, find_kernels, lora_init, merge
from jax_lora.errors import ConfigError
from jax_lora.finetune import generation
from jax_lora.finetune.generation import Generator
from jax_lora.models.decoding import advance

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


def test_prompts_of_different_lengths_are_completed_as_if_alone(tiny, tokenizer, generator):
    model, variables = tiny
    expected = [
        tokenizer.decode(slowly(model, variables, prompt, {tokenizer.eos_id}, 6))
        for prompt in PROMPTS
    ]
    assert generator.answer(PROMPTS) == expected
    assert len(set(expected)) == 3


def test_completions_of_several_batches_keep_the_order_of_the_prompts(generator):
    alone = [generator.answer([prompt])[0] for prompt in PROMPTS]
    assert generator.answer(PROMPTS * 3) == alone * 3


def test_a_completion_ends_at_any_end_token_of_the_model(tiny, tokenizer, generator):
    model, variables = tiny
    answer = slowly(model, variables, PROMPTS[0], {tokenizer.eos_id}, 6)
    assert len(answer) > 2
    ends = dataclasses.replace(model.config, eos_token_id=(0, answer[2]))
    stopped = dataclasses.replace(generator, model=model.clone(config=ends))
    first = answer.index(answer[2])
    assert stopped.answer(PROMPTS[:1]) == [tokenizer.decode(answer[:first])]


def test_a_completion_ends_before_a_stop_string_that_spans_tokens(tiny, tokenizer, generator):
    longer = dataclasses.replace(generator, max_tokens=40)
    whole = longer.answer(PROMPTS)
    for place in (1, 5, 17):  # in the first piece that is looked at, and in a later one
        stops = tuple(text[place : place + 3] for text in whole)
        assert any(len(tokenizer.encode(stop)) > 1 for stop in stops)
        expected = [text[: min(map(text.find, filter(text.__contains__, stops)))] for text in whole]
        assert dataclasses.replace(longer, stop=stops).answer(PROMPTS) == expected


def test_text_before_a_stop_string_in_the_same_token_is_kept(tokenizer, generator):
    prompts = [[number] for number in range(1, 25)]
    pieces = [tokenizer.decode([index]) for index in range(256, tokenizer.size)]
    prompt, text, piece = next(
        (prompt, text, piece)
        for prompt, text in zip(prompts, generator.answer(prompts), strict=True)
        for piece in pieces
        if piece in text and piece[1:]
    )
    stopped = dataclasses.replace(generator, stop=(piece[1:],)).answer([prompt])
    assert stopped == [text[: text.index(piece[1:])]]
    assert stopped[0].endswith(piece[0])


def test_a_stop_string_ends_decoding_early(generator, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return advance(*arguments)

    monkeypatch.setattr(generation, "advance", counted)
    longer = dataclasses.replace(generator, max_tokens=40)
    whole = longer.answer(PROMPTS[:1])[0]
    assert len(calls) == 1
    stopped = dataclasses.replace(longer, stop=(whole[2:6],))
    assert stopped.answer(PROMPTS[:1]) == [whole[: whole.index(whole[2:6])]]
    assert len(calls) == 2, "one segment of three"


def test_all_lengths_of_a_bucket_and_all_segments_share_a_compiled_function(generator):
    longer = dataclasses.replace(generator, max_tokens=40, stop=("never",))
    longer.answer(PROMPTS)
    before = advance._cache_size()
    longer.answer([[3], list(range(1, 60))])
    dataclasses.replace(longer, stop=("something", "else")).answer([[5] * 30])
    assert advance._cache_size() == before
    longer.answer([[3] * 65])
    assert advance._cache_size() == before + 1
    for settings in ({"temperature": 0.5}, {"temperature": 2.0, "top_k": 3, "top_p": 0.5}):
        dataclasses.replace(longer, **settings, seed=3).answer(PROMPTS)
    assert advance._cache_size() == before + 2


def test_samples_depend_only_on_the_seed_and_the_index_of_the_prompt(generator):
    drawn = dataclasses.replace(generator, temperature=2.0)
    answers = drawn.answer(PROMPTS)
    assert drawn.answer(PROMPTS) == answers
    assert dataclasses.replace(drawn, seed=1).answer(PROMPTS) != answers
    assert len(set(drawn.answer(PROMPTS[:1] * 4))) == 4
    # Another prompt beside it, another bucket and fewer rows change nothing.
    assert drawn.answer([[7] * 70, *PROMPTS[1:]])[1:] == answers[1:]
    assert dataclasses.replace(drawn, rows=1).answer(PROMPTS) == answers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 2.0}, "top_p"),
        ({"stop": ("",)}, "non-empty strings"),
        ({"stop": "end"}, "a tuple of non-empty strings"),
    ],
)
def test_invalid_settings_are_refused(generator, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(generator, **changes)


@pytest.mark.parametrize("prompt", [[], [1] * 123])
def test_a_prompt_that_is_too_long_is_refused(generator, prompt):
    with pytest.raises(ConfigError, match="at most 128 in total"):
        generator.answer([prompt])


@pytest.mark.parametrize("place", ["one device", "every device", "merged"])
def test_weights_committed_to_devices_cause_no_recompilation(tiny, tokenizer, place):
    model, variables = tiny
    devices = jax.devices()
    everywhere = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())
    if place == "merged":
        kernels = find_kernels(model.apply, variables, jnp.zeros((1, 4), jnp.int32))
        adapter = lora_init(jax.random.key(0), variables, LoraConfig(rank=2), kernels=kernels)
        variables = jax.jit(merge)(variables, adapter)
    else:
        where = devices[1] if place == "one device" else everywhere
        variables = jax.device_put(variables, where)
    before = advance._cache_size()
    generator = Generator(model, variables, tokenizer, max_tokens=9)
    assert len(list(generator.grow(tokenizer.encode("how many")))) > 2
    assert advance._cache_size() == before + 1
