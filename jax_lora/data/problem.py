"""Problems of an example's fields, and their messages."""

from __future__ import annotations

from typing import Any, NamedTuple


class Problem(NamedTuple):
    """Why an example is invalid, and how to fix it."""

    reason: str
    fix: str


def check_text(row: dict[str, Any], name: str, *, may_be_empty: bool = False) -> Problem | None:
    """Check a field that must be a string.

    Args:
      row: The fields of the example.
      name: The field's name.
      may_be_empty: Whether an empty string is valid.

    Returns:
      The problem, or None.
    """
    text = row[name]
    if not isinstance(text, str):
        return Problem(f'"{name}" is {kind_of(text)}, not a string', f'Make "{name}" a string.')
    if not text and not may_be_empty:
        return Problem(f'"{name}" is empty: no target tokens', "Add text, or delete the example.")
    return check_characters(text, f'"{name}"')


def check_characters(text: str, where: str) -> Problem | None:
    """Reject unpaired surrogates, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Problem(
            f"{where} has half of a surrogate pair at character {error.start + 1}",
            "Replace it with a complete character.",
        )
    return None


def kind_of(value: Any) -> str:
    """Describe the type of a JSON value, for messages."""
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
