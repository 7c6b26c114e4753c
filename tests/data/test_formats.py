import pytest

from jax_lora.data.formats import check_fields
from jax_lora.data.problem import Problem

USER = {"role": "user", "content": "2 + 3?"}
ANSWER = {"role": "assistant", "content": "5"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}


def checked(**row):
    found = check_fields(row)
    assert not isinstance(found, Problem), found
    return found


def refused(**row):
    found = check_fields(row)
    assert isinstance(found, Problem) and found.fix
    return found.reason


def test_completions_of_turns_are_a_chat_of_which_the_completion_is_learned():
    kind, fields = checked(prompt=[USER, ANSWER, USER], completion=[ANSWER])
    assert kind == "chat" and fields["learn_from"] == 3
    assert [turn["role"] for turn in fields["messages"]] == ["user", "assistant"] * 2


def test_a_prompt_alone_may_end_a_completion_of_turns_only_if_something_is_learned():
    assert "no target tokens" in refused(prompt=[USER, ANSWER], completion=[USER])


def test_one_list_and_one_string_are_no_completion():
    assert refused(prompt=[USER], completion="5") == '"prompt" is a list, not a string'


def test_alpaca_becomes_a_completion_with_its_input_or_without():
    _, with_input = checked(instruction="Add.", input="2 3", output="5")
    assert with_input["prompt"] == ("### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n")
    for nothing in ({"input": ""}, {"input": None}, {}):
        _, without = checked(instruction="Add.", output="5", **nothing)
        assert without["prompt"] == "### Instruction:\nAdd.\n\n### Response:\n"
    assert refused(instruction="Add.", input=3, output="5") == '"input" is a number, not a string'
    assert refused(instruction="Add.", output="") == '"output" is empty: no target tokens'


def test_sharegpt_becomes_a_chat():
    said = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    kind, fields = checked(conversations=said)
    assert kind == "chat"
    assert [turn["role"] for turn in fields["messages"]] == ["system", "user", "assistant"]
    assert "unknown speaker 'alien'" in refused(conversations=[{"from": "alien", "value": "x"}])
    assert 'has no "from" and "value"' in refused(conversations=[{"role": "user"}])
    assert "not a list of turns" in refused(conversations="hi")


def test_calls_of_tools_need_no_content_and_their_arguments_become_objects():
    turns = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}]
    _, fields = checked(messages=[*turns, ANSWER], tools=[{"type": "function"}])
    call = fields["messages"][1]
    assert call["content"] == ""
    assert call["tool_calls"][0]["function"]["arguments"] == {"a": 2, "b": 3}
    assert fields["tools"] == [{"type": "function"}]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"tool_calls": {}, "content": None}, '"content" is null'),
        ({"tool_calls": "add"}, '"tool_calls" is a string, not a list'),
        ({"tool_calls": [{}]}, '"tool_calls"[0] has no function name'),
        (
            {"tool_calls": [{"function": {"name": "add", "arguments": "{"}}]},
            '"arguments" are not a JSON object',
        ),
        ({"content": [{"type": "image"}]}, "has the type 'image', not \"text\""),
        ({}, 'has no "content"'),
    ],
)
def test_a_turn_that_cannot_be_used_is_placed(turn, reason):
    message = refused(messages=[USER, {"role": "assistant", **turn}])
    assert message.startswith('"messages"[1]') and reason in message


def test_content_written_in_parts_is_joined():
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 3?"}]
    _, fields = checked(messages=[{"role": "user", "content": parts}, ANSWER])
    assert fields["messages"][0]["content"] == "2 + 3?"


def test_tools_that_are_no_list_are_refused():
    assert refused(messages=[USER, ANSWER], tools="add") == (
        '"tools" is a string, not a list of objects'
    )


def test_other_fields_stay():
    _, fields = checked(instruction="Add.", output="5", seen=True)
    assert fields["seen"] is True and fields["instruction"] == "Add."


def test_a_misspelt_field_is_named_with_the_nearest():
    assert check_fields({"promt": "a", "completion": "b"}).fix == (
        '"promt": did you mean "prompt"?'
    )
    assert "Name the fields" in check_fields({"a": 1}).fix
