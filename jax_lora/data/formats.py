"""The formats that a row of data can have: completions, text, chat. Found row by row, by keys."""

from __future__ import annotations

from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")


class Problem(NamedTuple):
    """Why a row cannot be used, and what to do about it."""

    reason: str
    fix: str


def check_fields(value: Any) -> tuple[str, dict[str, Any]] | Problem:
    """Find the format of a row and check all that training will need from it.

    Args:
      value: Any JSON value.

    Returns:
      The format's name (`"completions"`, `"text"` or `"chat"`) and the row; or the problem.

    Example:
      >>> check_fields({"text": "Once upon a time"})[0]
      'text'
      >>> check_fields({"input": "a"}).reason
      'no known format; the fields are "input"'
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        return Problem(f"a JSON {kind} where an object is needed", 'Write {"text": "..."}.')
    if "messages" in value:
        return _check_chat(value)
    if "prompt" in value and "completion" in value:
        return _check_completion(value)
    if "text" in value:
        problem = _check_text(value, "text")
        return problem or ("text", value)
    fields = ", ".join(f'"{name}"' for name in list(value)[:10]) or "none"
    return Problem(
        f"no known format; the fields are {fields}",
        'Name the fields "prompt" and "completion", or "text", or "messages".',
    )


def _check_completion(row: dict[str, Any]) -> tuple[str, dict[str, Any]] | Problem:
    for name in ("prompt", "completion"):
        problem = _check_text(row, name, may_be_empty=name == "prompt")
        if problem:
            return problem
    return "completions", row


def _check_text(row: dict[str, Any], name: str, *, may_be_empty: bool = False) -> Problem | None:
    text = row[name]
    if not isinstance(text, str):
        return Problem(f'"{name}" is {_kind(text)}, not a string', f'Make "{name}" a string.')
    if not text and not may_be_empty:
        return Problem(
            f'"{name}" is empty: there is nothing to learn', "Fill it, or delete the row."
        )
    return _check_characters(text, f'"{name}"')


def _check_characters(text: str, where: str) -> Problem | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Problem(
            f"{where} has half of a surrogate pair at character {error.start + 1}",
            "Write the character whole.",
        )
    return None


def _check_chat(row: dict[str, Any]) -> tuple[str, dict[str, Any]] | Problem:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return Problem(
            f'"messages" is {_kind(messages)}, not a list of turns',
            'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].',
        )
    for index, message in enumerate(messages):
        problem = _check_message(message, f'"messages"[{index}]')
        if problem:
            return problem
    if not any(message["role"] == "assistant" for message in messages):
        return Problem('no turn has the role "assistant": there is nothing to learn', "Add one.")
    return "chat", row


def _check_message(message: Any, where: str) -> Problem | None:
    if not isinstance(message, dict):
        return Problem(f"{where} is {_kind(message)}, not an object", "Give it a role and content.")
    for name in ("role", "content"):
        if name not in message:
            return Problem(f'{where} has no "{name}"', f'Add "{name}" to the turn.')
        if not isinstance(message[name], str):
            kind = _kind(message[name])
            return Problem(f'{where}: "{name}" is {kind}, not a string', "Make it a string.")
    if message["role"] not in ROLES:
        roles = ", ".join(ROLES)
        return Problem(f"{where}: unknown role {message['role'][:40]!r}", f"Use one of {roles}.")
    return _check_characters(message["content"], where)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
