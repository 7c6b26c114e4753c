"""Validate the turns of a conversation for chat templates: roles, content, tool calls."""

from __future__ import annotations

from typing import Any

from jax_lora.data.problem import Problem, check_characters, kind_of
from jax_lora.storage.json_files import parse_json

# Fields in which OpenAI, Axolotl and ms-swift mark the turns that are included in the loss.
_UNUSED_MARKS = ("train_detail", "training_detail", "token_weights", "loss_scale")
_MARKS = ("weight", "train", "training", "loss", *_UNUSED_MARKS)
ROLES = ("system", "developer", "user", "assistant", "tool")


def check_turns(turns: Any, where: str) -> list[dict[str, Any]]:
    """Check a conversation, and write every turn's content as one string.

    Raises:
      Problem: A turn is invalid; the first one is reported.
    """
    if not isinstance(turns, list) or not turns:
        raise Problem(
            f"{where} is {kind_of(turns)}, not a list of turns",
            'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].',
        )
    return [_check_turn(turn, f"{where}[{index}]") for index, turn in enumerate(turns)]


def target_turns(messages: list[dict[str, Any]], learn_from: int = 0) -> list[int]:
    """Return the indices of the responses, from `learn_from` on, that are included in the loss."""
    return [
        index
        for index, turn in enumerate(messages)
        if turn["role"] == "assistant" and index >= learn_from and turn.get("weight") != 0
    ]


def check_tools(tools: Any, name: str) -> list[dict[str, Any]] | None:
    """Check the descriptions of the tools that a model may call; None if there are none.

    Raises:
      Problem: The value is not a list of objects.
    """
    if tools is None or tools == []:
        return None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return [_without_null_parameters(tool) for tool in tools]
    raise Problem(
        f'"{name}" is {kind_of(tools)}, not a list of objects',
        'Write [{"type": "function", "function": {"name": "...", "parameters": {...}}}].',
    )


def _without_null_parameters(value: Any) -> Any:
    """Remove null parameters, because in files from Arrow every tool has those of all tools."""
    if isinstance(value, list):
        return [_without_null_parameters(each) for each in value]
    if not isinstance(value, dict):
        return value
    parts = {name: _without_null_parameters(each) for name, each in value.items()}
    if isinstance(own := parts.get("properties"), dict):
        parts["properties"] = {name: each for name, each in own.items() if each is not None}
    return parts


def without_foreign_arguments(
    turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Remove null arguments that the called tool does not have, from files converted from Arrow."""
    known: dict[str, Any] = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            known[str(function.get("name"))] = parameters["properties"]
    if not known:
        return turns
    return [
        turn | {"tool_calls": [_own_arguments(call, known) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in turns
    ]


def _own_arguments(call: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    parameters = known.get(function["name"])
    if parameters is None:
        return call
    arguments = {
        name: value
        for name, value in function["arguments"].items()
        if value is not None or name in parameters
    }
    return call | {"function": function | {"arguments": arguments}}


def _check_turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise Problem(f"{where} is {kind_of(turn)}, not an object", "Give it a role and content.")
    turn = _as_tool_call(turn)
    calls = turn.get("tool_calls") or None
    for name in ("role", "content"):
        if name not in turn and not (name == "content" and calls):
            raise Problem(f'{where} has no "{name}"', f'Add "{name}" to the turn.')
    if not isinstance(turn["role"], str):
        kind = kind_of(turn["role"])
        raise Problem(f'{where}: "role" is {kind}, not a string', "Make it a string.")
    if turn["role"] not in ROLES:
        roles = ", ".join(ROLES)
        raise Problem(f"{where}: unknown role {turn['role'][:40]!r}", f"Use one of {roles}.")
    content = _content(turn.get("content"), where, may_be_null=bool(calls))
    checked = {**_weight(turn, where), "content": content}
    return checked if calls is None else checked | {"tool_calls": _check_calls(calls, where)}


def _as_tool_call(turn: dict[str, Any]) -> dict[str, Any]:
    """Convert the older `function_call` and role `function` to `tool_calls` and role `tool`."""
    if turn.get("role") == "function":
        turn = {**turn, "role": "tool"}
    call = turn.get("function_call")
    if "function_call" not in turn or (call and turn.get("tool_calls")):
        return turn
    rest = {name: value for name, value in turn.items() if name != "function_call"}
    return {**rest, "tool_calls": [{"type": "function", "function": call}]} if call else rest


def _weight(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace the marks of a turn with a weight of 0 if they exclude it, or remove them."""
    marks = {name: turn[name] for name in _MARKS if turn.get(name) is not None}
    rest = {name: value for name, value in turn.items() if name not in _MARKS}
    for name, value in marks.items():
        if name in _UNUSED_MARKS:
            raise Problem(f'{where}: "{name}" is not used', f'Remove "{name}".')
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Problem(
                f'{where}: "{name}" is {value!r:.40}', "Write 1 to learn the turn, 0 to mask it."
            )
        if value and turn["role"] != "assistant":
            raise Problem(
                f'{where}: "{name}" is {value!r} in a turn of the {turn["role"]}',
                f'Only assistant turns are included in the loss; remove "{name}".',
            )
    included = {bool(value) for value in marks.values()}
    if len(included) > 1:
        names = " and ".join(f'"{name}"' for name in marks)
        raise Problem(f"{where}: {names} disagree", "Remove one of them.")
    return {**rest, "weight": 0} if False in included and turn["role"] == "assistant" else rest


def _content(content: Any, where: str, *, may_be_null: bool) -> str:
    """Return the content as one string; join it if it is a list of text parts."""
    if content is None and may_be_null:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type")
                raise Problem(
                    f'{where}: a part of "content" has the type {kind!r:.40}, not "text"',
                    "Only text is supported; remove the part.",
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Problem(
            f'{where}: "content" is {kind_of(content)}, not a string', "Make it a string."
        )
    check_characters(content, where)
    return content


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Check tool calls, and parse arguments that are given as a JSON string."""
    if not isinstance(calls, list):
        raise Problem(f'{where}: "tool_calls" is {kind_of(calls)}, not a list', "Make it a list.")
    checked = []
    for number, call in enumerate(calls):
        at = f'{where}: "tool_calls"[{number}]'
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Problem(
                f"{at} has no function name",
                'Write {"type": "function", "function": {"name": "...", "arguments": {...}}}.',
            )
        arguments = function.get("arguments", {})
        arguments = {} if arguments == "" else parsed_json(arguments)
        if not isinstance(arguments, dict):
            raise Problem(
                f'{at}: "arguments" are not a JSON object',
                "Write them as an object, or as its JSON.",
            )
        checked.append(
            {"type": "function", **call, "function": {**function, "arguments": arguments}}
        )
    return checked


def parsed_json(value: Any) -> Any:
    """Return the value of a string that is JSON, and any other value as it stands."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
