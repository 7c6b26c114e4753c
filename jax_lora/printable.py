"""Escape characters in untrusted text that could control the terminal or hide other text."""

from __future__ import annotations

import re

# Newlines, tabs and the invisible characters that words and emoji of many scripts need.
PROSE = "\n\t\u00ad\u200c\u200d\u200e\u200f" + "".join(map(chr, range(0xE0020, 0xE0080)))

_UNPRINTABLE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of text
    "\u00ad\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200d\u2060-\u2065\u206a-\u206f"
    "\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff"  # invisible
    "\u2028\u2029"  # separators of lines
    "\ud800-\udfff"  # lone surrogates, which no encoding accepts
    "]"
)


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Escape control characters, invisible characters and marks that change text direction.

    Escaping a second time changes nothing.

    Args:
      text: Text from a file or a model.
      keep: Characters to keep; `PROSE` for text that people read, `""` for one line.

    Returns:
      The text.

    Example:
      >>> printable("red: \x1b[31m")
      'red: \\x1b[31m'
    """
    return _UNPRINTABLE.sub(lambda found: _escaped(found[0], keep), text)


def _escaped(character: str, keep: str) -> str:
    return character if character in keep else character.encode("unicode_escape").decode()
