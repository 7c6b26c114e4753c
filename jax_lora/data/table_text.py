"""Detect the encoding and the separator of a table, as spreadsheets write them."""

from __future__ import annotations

import codecs
import csv

SEPARATORS = (",", ";", "\t", "|")
# Text in a Western language has few other letters. Bytes of other encodings have many.
MOST_ACCENTED = 0.2


def read_table_text(content: bytes) -> str:
    """Decode a table from UTF-8, UTF-16 with a byte order mark, or Windows-1252.

    Raises:
      UnicodeDecodeError: It is in none of them.
    """
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise error from None
        letters = [letter for letter in text if letter.isalpha()]
        if sum(not letter.isascii() for letter in letters) > MOST_ACCENTED * len(letters):
            raise error
        return text


def table_separator(text: str, usual: str) -> tuple[str, str]:
    """Find what separates the cells, from the first line or from Excel's line `sep=;`.

    Returns:
      The separator, of which the usual one wins a tie, and the table without Excel's line.

    Example:
      >>> table_separator("prompt;completion", ",")[0]
      ';'
    """
    first, _, rest = text.partition("\n")
    first = first.rstrip("\r")
    if len(first) == 5 and first.lower().startswith("sep="):
        return first[4], rest
    counts = {each: _cells(first, each) for each in (usual, *SEPARATORS)}
    return max(counts, key=counts.__getitem__), text


def _cells(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator), []))
    except csv.Error:
        return 0
