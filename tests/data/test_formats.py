import json

import pytest

from jax_lora.data.formats import check_fields
from jax_lora.data.problem import Problem

USER = {"role": "user", "content": "2 + 3?"}
ANSWER = {"role": "assistant", "content": "5"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}


def checked(**row):
    return check_fields(row)


def problem(**row):
    with pytest.raises(Problem) as found:
        check_fields(row)
    assert found.value.fix
    return found.value


def refused(**row):
    return problem(**row).reason


def test_a_completion_of_turns_is_a_chat_with_loss_on_the_completion():
    kind, fields = checked(prompt=[USER, ANSWER, USER], completion=[ANSWER])
    assert kind == "chat" and fields["learn_from"] == 3
    assert [turn["role"] for turn in fields["messages"]] == ["user", "assistant"] * 2


def test_a_completion_of_turns_needs_an_assistant_turn():
    assert "no target tokens" in refused(prompt=[USER, ANSWER], completion=[USER])


def test_a_prompt_and_a_completion_of_different_types_are_refused():
    assert refused(prompt=[USER], completion="5") == '"prompt" is a list, not a string'


def test_alpaca_is_converted_with_and_without_input():
    _, with_input = checked(instruction="Add.", input="2 3", output="5")
    assert with_input["prompt"] == ("### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n")
    for nothing in ({"input": ""}, {"input": None}, {}):
        _, without = checked(instruction="Add.", output="5", **nothing)
        assert without["prompt"] == "### Instruction:\nAdd.\n\n### Response:\n"
    assert refused(instruction="Add.", input=3, output="5") == '"input" is a number, not a string'
    assert refused(instruction="Add.", output="") == '"output" is empty: no target tokens'


def test_sharegpt_is_converted_to_a_chat():
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


def test_tool_calls_need_no_content_and_their_arguments_become_objects():
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
def test_an_invalid_turn_is_reported_with_its_index(turn, reason):
    message = refused(messages=[USER, {"role": "assistant", **turn}])
    assert message.startswith('"messages"[1]') and reason in message


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 3?"}]
    _, fields = checked(messages=[{"role": "user", "content": parts}, ANSWER])
    assert fields["messages"][0]["content"] == "2 + 3?"


def test_tools_must_be_a_list():
    assert refused(messages=[USER, ANSWER], tools="add") == (
        '"tools" is a string, not a list of objects'
    )


def test_other_fields_are_kept():
    _, fields = checked(instruction="Add.", output="5", seen=True)
    assert fields["seen"] is True and fields["instruction"] == "Add."


CHAT = [USER, ANSWER]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("turns", [{"messages": CHAT}, {"conversations": SHARED}])
def test_a_system_prompt_and_tools_beside_the_turns_are_used(turns):
    _, fields = checked(**turns, system="Be brief.", tools=json.dumps([TOOL]))
    assert fields["messages"][0] == {"role": "system", "content": "Be brief."}
    assert fields["tools"] == [TOOL] and "system" not in fields
    _, older = checked(**turns, functions=[TOOL["function"]])
    assert older["tools"] == [TOOL]


def test_two_system_prompts_are_refused_unless_they_are_equal():
    said = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert len(checked(messages=said, system="Be brief.")[1]["messages"]) == 3
    assert '"system" differs' in refused(messages=said, system="Be kind.")
    assert "differ" in refused(messages=CHAT, system="a", system_prompt="b")
    assert refused(messages=CHAT, system=3) == '"system" is a number, not a string'
    assert "both given" in refused(messages=CHAT, tools=[TOOL], functions=[{"name": "add"}])


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "a", "completion": "b", "system": "c"}, "system"),
        ({"text": "a", "tools": [TOOL]}, "tools"),
        ({"instruction": "a", "output": "b", "tools": [TOOL]}, "tools"),
        ({"messages": CHAT, "history": [["a", "b"]]}, "history"),
        ({"messages": CHAT, "images": ["a.png"]}, "images"),
    ],
)
def test_a_field_that_the_format_does_not_use_is_refused_by_name(row, field):
    assert f'"{field}" is not used' in refused(**row)
    kind, _ = checked(**row | {field: None})
    assert kind in ("completions", "text", "chat")


def test_system_and_history_of_alpaca_are_part_of_the_prompt():
    _, fields = checked(instruction="Add.", output="5", system="Be brief.", history=[["q", "a"]])
    assert fields["prompt"] == (
        "Be brief.\n\n### Instruction:\nq\n\n### Response:\na\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert [turn["content"] for turn in fields["turns"]] == ["Be brief.", "q", "a", "Add.", "5"]
    assert "pairs" in refused(instruction="a", output="b", history=["q"])


def test_columns_of_dolly_and_of_questions_are_found():
    for names in (("instruction", "context", "response"), ("question", "context", "answer")):
        kind, fields = checked(**dict(zip(names, ("Add.", "2 3", "5"), strict=True)))
        assert kind == "completions" and fields["completion"] == "5"
        assert "### Input:\n2 3" in fields["prompt"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_turn_that_is_marked_off_has_a_weight_of_0(mark):
    _, fields = checked(messages=[USER, ANSWER | mark, USER, ANSWER | {"weight": 1}])
    assert [turn.get("weight") for turn in fields["messages"]] == [None, 0, None, None]
    assert "no target tokens" in refused(messages=[USER, ANSWER | mark])


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"weight": 0.5}, '"weight" is 0.5'),
        ({"weight": 1, "train": False}, "disagree"),
        ({"train_detail": [1]}, '"train_detail" is not used'),
    ],
)
def test_a_mark_that_cannot_be_used_is_refused(mark, reason):
    assert reason in refused(messages=[USER, ANSWER | mark])
    assert "turn of the user" in refused(messages=[USER | {"train": True}, ANSWER])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", 0),
        ("train", False),
        ("label", False),
        ("suffix", "b"),
        ("rejected_response", "b"),
    ],
)
def test_a_field_of_an_example_that_would_change_the_targets_is_refused(field, value):
    assert f'"{field}"' in refused(prompt="q", completion="a", **{field: value})
    assert f'"{field}"' in refused(messages=[USER, ANSWER], **{field: value})
    checked(messages=[USER, ANSWER], weight=1, label="news")  # raises for a refusal


def test_nulls_of_other_tools_are_removed_from_calls_and_parameters():
    city = {"type": "string"}
    tool = {
        "name": "weather",
        "parameters": {"properties": {"city": city, "day": {}, "zone": None}},
    }
    call = {"name": "weather", "arguments": {"city": "Oslo", "day": None, "zone": None}}
    said = {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
    _, fields = checked(messages=[USER, said], tools=[{"type": "function", "function": tool}])
    assert fields["tools"][0]["function"]["parameters"]["properties"] == {"city": city, "day": {}}
    arguments = fields["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"city": "Oslo", "day": None}


def test_older_function_calls_become_tool_calls():
    call = {"name": "add", "arguments": "{}"}
    said = [USER, {"role": "assistant", "content": None, "function_call": call}]
    _, fields = checked(messages=[*said, {"role": "function", "name": "add", "content": "5"}])
    assert fields["messages"][1]["tool_calls"][0]["function"]["name"] == "add"
    assert fields["messages"][2]["role"] == "tool"
    shared = [SHARED[0], {"from": "function_call", "value": json.dumps(call)}]
    _, same = checked(conversations=shared)
    assert same["messages"][1]["tool_calls"] == fields["messages"][1]["tool_calls"]


def test_a_misspelled_field_is_reported_with_a_suggestion():
    assert problem(promt="a", completion="b").fix == ('"promt": did you mean "prompt"?')
    assert problem(message="a", category="b").fix.endswith(
        "Or name the columns, for example prompt=message,completion=category."
    )
    assert "Name the fields" in problem(a=1).fix
