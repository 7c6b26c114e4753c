"""Validate the turns of a conversation for chat templates: roles, content, tool calls."""

from __future__ import annotations

import json
from typing import Any

from jax_lora.data.problem import Problem, check_characters, kind_of

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_turns(turns: Any, where: str) -> list[dict[str, Any]] | Problem:
    """Check a conversation, and write every turn's content as one string.

    Args:
      turns: The value of the field.
      where: The field's name in quotes, for messages.

    Returns:
      The turns, or the first problem.
    """
    if not isinstance(turns, list) or not turns:
        return Problem(
            f"{where} is {kind_of(turns)}, not a list of turns",
            'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].',
        )
    checked = []
    for index, turn in enumerate(turns):
        one = _check_turn(turn, f"{where}[{index}]")
        if isinstance(one, Problem):
            return one
        checked.append(one)
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]] | Problem | None:
    """Check the descriptions of the tools that a model may call.

    Args:
      tools: The value of the field.

    Returns:
      The descriptions; None if there are none; or the problem.
    """
    if tools is None or tools == []:
        return None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    return Problem(
        f'"tools" is {kind_of(tools)}, not a list of objects',
        'Write [{"type": "function", "function": {"name": "...", "parameters": {...}}}].',
    )


def _check_turn(turn: Any, where: str) -> dict[str, Any] | Problem:
    if not isinstance(turn, dict):
        return Problem(f"{where} is {kind_of(turn)}, not an object", "Give it a role and content.")
    calls = turn.get("tool_calls") or None
    for name in ("role", "content"):
        if name not in turn and not (name == "content" and calls):
            return Problem(f'{where} has no "{name}"', f'Add "{name}" to the turn.')
    if not isinstance(turn["role"], str):
        kind = kind_of(turn["role"])
        return Problem(f'{where}: "role" is {kind}, not a string', "Make it a string.")
    if turn["role"] not in ROLES:
        roles = ", ".join(ROLES)
        return Problem(f"{where}: unknown role {turn['role'][:40]!r}", f"Use one of {roles}.")
    content = _content(turn.get("content"), where, may_be_null=bool(calls))
    if isinstance(content, Problem):
        return content
    checked = {**turn, "content": content}
    if calls is None:
        return checked
    calls = _check_calls(calls, where)
    return calls if isinstance(calls, Problem) else checked | {"tool_calls": calls}


def _content(content: Any, where: str, *, may_be_null: bool) -> str | Problem:
    """Return the content as one string; join it if it is a list of text parts."""
    if content is None and may_be_null:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type")
                return Problem(
                    f'{where}: a part of "content" has the type {kind!r:.40}, not "text"',
                    "Only text is supported; remove the part.",
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        return Problem(
            f'{where}: "content" is {kind_of(content)}, not a string', "Make it a string."
        )
    return check_characters(content, where) or content


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]] | Problem:
    """Check tool calls, and parse arguments that are given as a JSON string."""
    if not isinstance(calls, list):
        return Problem(f'{where}: "tool_calls" is {kind_of(calls)}, not a list', "Make it a list.")
    checked = []
    for number, call in enumerate(calls):
        at = f'{where}: "tool_calls"[{number}]'
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return Problem(
                f"{at} has no function name",
                'Write {"type": "function", "function": {"name": "...", "arguments": {...}}}.',
            )
        arguments = _arguments(function.get("arguments", {}))
        if arguments is None:
            return Problem(
                f'{at}: "arguments" are not a JSON object',
                "Write them as an object, or as its JSON.",
            )
        checked.append(
            {"type": "function", **call, "function": {**function, "arguments": arguments}}
        )
    return checked


def _arguments(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None
