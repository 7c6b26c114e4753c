"""Escape control characters in untrusted text, so that it cannot control the terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Escape control characters and marks that change the direction of text.

    Args:
      text: Text from a file or a model.
      keep: Control characters to keep.

    Returns:
      The text.

    Example:
      >>> printable("red: \x1b[31m")
      'red: \\x1b[31m'
    """
    return "".join(c if c in keep or not _is_control(c) else _escaped(c) for c in text)


def _is_control(character: str) -> bool:
    bidirectional = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return bidirectional or unicodedata.category(character) == "Cc"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
