"""Problems of an example's fields, and their messages."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """Why an example is invalid, and how to fix it; the checks of its fields raise it."""

    def __init__(self, reason: str, fix: str):
        """Keep both texts."""
        super().__init__(reason, fix)
        self.reason, self.fix = reason, fix


def check_text(row: dict[str, Any], name: str, *, may_be_empty: bool = False) -> None:
    """Check that a field is a string, and is not empty unless it may be.

    Raises:
      Problem: It is not.
    """
    text = row[name]
    if not isinstance(text, str):
        raise Problem(f'"{name}" is {kind_of(text)}, not a string', f'Make "{name}" a string.')
    if not text and not may_be_empty:
        raise Problem(f'"{name}" is empty: no target tokens', "Add text, or delete the example.")
    check_characters(text, f'"{name}"')


def check_characters(text: str, where: str) -> None:
    """Reject unpaired surrogates, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Problem(
            f"{where} has half of a surrogate pair at character {error.start + 1}",
            "Replace it with a complete character.",
        ) from error


def kind_of(value: Any) -> str:
    """Describe the type of a JSON value, for messages."""
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
