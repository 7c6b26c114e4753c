"""Wrap text between words while it is streamed to a terminal."""

from __future__ import annotations

import unicodedata


class WordWrap:
    r"""Wrap a stream of text.

    A word is held back until it is complete: only then can it be placed on a line.

    Args:
      width: Columns of the terminal.

    Example:
      >>> wrap = WordWrap(12)
      >>> wrap.feed("one two th") + wrap.feed("ree four") + wrap.flush()
      'one two\nthree four'
    """

    def __init__(self, width: int):
        """Start in the first column."""
        self._width, self._column = width, 0
        self._space, self._word = "", ""
        self._inside = False  # whether the held word continues one that is partly shown

    def feed(self, text: str) -> str:
        """Add text, and return what can be shown."""
        return "".join(map(self._add, text))

    def flush(self) -> str:
        """Return the text that is held back."""
        shown = self._place() + self._space
        self._space = ""
        return shown

    def _add(self, character: str) -> str:
        if character == "\n":
            shown = self._place() + "\n"
            self._space, self._column, self._inside = "", 0, False
            return shown
        if character.isspace():
            shown = self._place()
            self._space += character
            self._inside = False
            return shown
        if _cells(character) > 1:  # scripts without spaces: a line may end after any character
            shown, self._inside = self._place(), False
            self._word = character
            return shown + self._place()
        self._word += character
        if _cells(self._word) < self._width:
            return ""
        shown, self._inside = self._place(), True  # longer than a line: the terminal breaks it
        return shown

    def _place(self) -> str:
        """Return the held word, on a new line if it does not fit."""
        if not self._word:
            return ""
        gap, size = _cells(self._space), _cells(self._word)
        fits = self._inside or not self._column or self._column + gap + size <= self._width
        shown = (self._space if fits else "\n") + self._word
        column = (self._column + gap if fits else 0) + size
        self._column = (column - 1) % self._width + 1  # the terminal breaks longer words
        self._space = self._word = ""
        return shown


def _cells(text: str) -> int:
    """Count the columns of a text: two for wide characters, none for combining characters."""
    return sum(
        2 if unicodedata.east_asian_width(each) in "WF" else not unicodedata.combining(each)
        for each in text
    )
