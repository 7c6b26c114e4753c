"""The target tokens of a chat, with templates like those of well-known models."""

import pytest

from jax_lora.data.encoding import encode_row
from jax_lora.data.formats import check_fields
from jax_lora.data.rows import Row
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError
from tests.tiny_model import write_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ '<|start|>' }}{% for m in messages %}"
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ '<|start|>' }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
BRACKETS = (
    "{{ '<|start|>' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% set said = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and rows?"},
    {"role": "assistant", "content": "three"},
]
LEARNED = {
    "chatml": (CHATML, "two<|im_end|>\nthree<|im_end|>\n"),
    "headers": (HEADERS, "two<|im_end|>three<|im_end|>"),
    "no system": (NO_SYSTEM, "two<|im_end|>\nthree<|im_end|>\n"),
    "brackets": (BRACKETS, " two<|end|> three<|end|>"),
    "thinking": (THINKING, "two<|im_end|>\nthree<|im_end|>\n"),
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>")


@pytest.fixture
def load(tmp_path):
    def make(template):
        bos = "<|start|>" if "<|start|>" in template else None
        folder = write_tokenizer(tmp_path / "model", bos=bos, template=template, special=SPECIAL)
        return Tokenizer.load(folder)

    return make


def encoded(tokenizer, turns=TURNS, which="all", **row):
    kind, fields = check_fields(row or {"messages": turns})
    return encode_row(Row(1, kind, fields), tokenizer, turns=which)


def learned(result, tokenizer):
    ids = [index for index, known in zip(result.ids, result.loss_mask, strict=True) if known]
    return tokenizer._backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", LEARNED)
def test_only_responses_with_their_end_of_turn_text_are_targets(load, name):
    template, expected = LEARNED[name]
    tokenizer = load(template)
    result = encoded(tokenizer)
    assert learned(result, tokenizer) == expected
    assert result.unlocated == 0
    if tokenizer.bos_id is not None:
        assert result.ids.count(tokenizer.bos_id) == 1
    assert result.raw == sum(len(tokenizer.encode(turn["content"])) for turn in TURNS) - 4 * (
        tokenizer.bos_id is not None
    )


@pytest.mark.parametrize("name", LEARNED)
def test_turns_last_limits_the_loss_to_the_last_response(load, name):
    template, expected = LEARNED[name]
    tokenizer = load(template)
    last = expected[expected.index("three") :]
    assert learned(encoded(tokenizer, which="last"), tokenizer).strip(" ") == last


def test_eos_is_not_added_after_the_end_token_of_the_template(load):
    tokenizer = load(CHATML)
    assert tokenizer.eos_id not in encoded(tokenizer).ids


def test_removed_reasoning_is_not_a_target_but_its_response_is(load):
    tokenizer = load(THINKING)
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "<think>hm</think>\ntwo"
    turns[3]["content"] = "<think>well</think>\nthree"
    result = encoded(tokenizer, turns)
    assert learned(result, tokenizer) == ("two<|im_end|>\n<think>well</think>\nthree<|im_end|>\n")


def test_a_rewritten_response_is_counted_and_has_no_loss(load):
    template = CHATML.replace(
        "m.content", "(m.content if loop.last or m.role == 'user' else m.content | upper)"
    )
    tokenizer = load(template)
    result = encoded(tokenizer)
    assert (learned(result, tokenizer), result.unlocated) == ("three<|im_end|>\n", 1)


def test_only_the_completion_of_a_completion_of_turns_is_a_target(load):
    tokenizer = load(CHATML)
    result = encoded(tokenizer, prompt=TURNS[:3], completion=TURNS[3:])
    assert learned(result, tokenizer) == "three<|im_end|>\n"


def test_tools_are_in_the_prompt(load):
    template = "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}" + CHATML
    tokenizer = load(template)
    tools = [{"type": "function", "function": {"name": "count"}}]
    result = encoded(tokenizer, messages=TURNS, tools=tools)
    assert '"name": "count"' in tokenizer._backend.decode(result.ids)
    assert learned(result, tokenizer) == LEARNED["chatml"][1]


EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("said", ["", "I look."])
def test_a_tool_call_is_a_target_to_its_end(load, said):
    tokenizer = load(EMPTY_THOUGHT)
    call = {"role": "assistant", "content": said, "tool_calls": [{"function": {"name": "count"}}]}
    told = {"role": "tool", "content": "two"}
    result = encoded(tokenizer, [TURNS[0], call, told, call, told, TURNS[1]])
    called = said + '{"name": "count", "arguments": {}}<|im_end|>\n'
    last = "<think>\n\n</think>\n\ntwo<|im_end|>\n"
    assert learned(result, tokenizer) == called * 2 + last
    assert result.unlocated == 0


def test_a_response_with_a_weight_of_0_is_not_a_target(load):
    tokenizer = load(CHATML)
    turns = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    assert learned(encoded(tokenizer, turns), tokenizer) == "three<|im_end|>\n"


@pytest.mark.parametrize("template", [CHATML, EMPTY_THOUGHT])
def test_the_number_of_renderings_does_not_grow_with_the_conversation(load, template):
    tokenizer = load(template)
    rendered = []

    def render(messages, **options):
        rendered.append(len(messages))
        return Tokenizer.render(tokenizer, messages, **options)

    tokenizer.render = render
    encoded(tokenizer, TURNS * 10)
    assert len(rendered) < 8


def test_tools_that_the_template_does_not_show_are_an_error(load):
    tool = {"type": "function", "function": {"name": "count"}}
    with pytest.raises(DataError, match="does not show the tool 'count'"):
        encoded(load(CHATML), messages=TURNS, tools=[tool])


@pytest.mark.parametrize(
    ("turns", "name"),
    [
        ([{"role": "system", "content": "be brief"}, *TURNS], "content"),
        ([*TURNS[:3], TURNS[3] | {"reasoning_content": "1 + 2"}], "reasoning_content"),
    ],
)
def test_a_part_of_a_conversation_that_the_template_drops_is_refused(load, turns, name):
    shout = "(m.content | upper if m.role == 'user' else m.content)"
    shown = CHATML.replace("m.content", shout).replace(
        "messages %}", "messages if m.role != 'system' %}"
    )
    tokenizer = load(shown)
    assert encoded(tokenizer).unlocated == 0
    with pytest.raises(DataError, match=f'does not show the "{name}"'):
        encoded(tokenizer, turns)
