"""Text of strangers on a terminal: nothing in it may steer the terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Write control characters out, so that a terminal shows them and does not obey them.

    Args:
      text: Text from a file, or from a model.
      keep: Control characters that stay.

    Returns:
      The text.

    Example:
      >>> printable("red: \x1b[31m")
      'red: \\x1b[31m'
    """
    return "".join(c if c in keep or not _steers(c) else _escaped(c) for c in text)


def _steers(character: str) -> bool:
    # Control characters, and marks that turn the direction of the text around them.
    bidirectional = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return bidirectional or unicodedata.category(character) == "Cc"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
