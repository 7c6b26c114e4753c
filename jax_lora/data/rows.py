"""Reads rows: every one checked, every line accounted for, before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_lora.data.columns import rename
from jax_lora.data.formats import check_fields
from jax_lora.data.problem import Problem
from jax_lora.data.row_files import RawFile, read_content, read_raw
from jax_lora.errors import DataError
from jax_lora.storage.safe_paths import given_path

SHOWN_PROBLEMS = 10
SHOWN_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row of a file.

    Args:
      line: Its line, counted from 1.
      kind: `"completions"`, `"text"`, `"labeled"`, or `"chat"`, found row by row, as files mix
        them; or `"document"`, a text that is cut into pieces.
      fields: The row in its form, extra fields and all.
    """

    line: int
    kind: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The rows of one file, or a part of them.

    Args:
      path: The file.
      rows: Its rows; `lines == len(rows) + blank`, since a file with a bad row is refused.
      lines: How many lines the file has.
      blank: How many of them are blank, and skipped.
      digest: A hash of the file, to detect changes.
      skipped: Files in a folder of texts that are not texts.
    """

    path: Path
    rows: tuple[Row, ...]
    lines: int
    blank: int
    digest: str = ""
    skipped: int = 0

    def where(self, row: Row) -> str:
        """Return the place of a row, for messages."""
        return f"{self.path}:{row.line}"

    @contextlib.contextmanager
    def located(self, row: Row) -> Iterator[None]:
        """Add the place of a row to the `DataError` of a block."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.where(row)}: {error}") from error


def read_rows(path: str | Path) -> RowFile:
    r"""Read a file of rows and check every one of them.

    Use it before anything slow happens: a bad row found after an hour of training is an hour lost.

    Args:
      path: A file of one of the kinds of `row_files`. A byte order mark, CRLF and blank lines are
        fine.

    Returns:
      The rows.

    Raises:
      DataError: The file is missing or holds no row; or rows are wrong, in which case the message
        has `file:line`, the row and a fix for each of the first ten, and counts all.

    Example:
      >>> import pathlib, tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
      >>> _ = file.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')
      >>> read_rows(file).rows[0].kind
      'completions'
    """
    path = given_path(path, DataError)
    content = read_content(path)
    raw = read_raw(path, content)
    rows: list[Row] = []
    refused: list[str] = []  # the first of them
    count = 0
    for number, shown, value in raw.rows:
        try:
            if isinstance(value, Problem):
                raise value
            rows.append(Row(number, *check_fields(rename(value))))
        except Problem as problem:
            count += 1
            if count <= SHOWN_PROBLEMS:
                refused.append(_shown(path, number, shown, problem))
    if refused:
        raise DataError(_refusal(path, refused, count, len(rows), raw))
    if not rows:
        raise DataError(
            str(path),
            got=f"no row in {raw.lines} lines",
            expected="at least one row",
            fix='Write rows such as {"prompt": "...", "completion": "..."}.',
        )
    digest = hashlib.sha256(content).hexdigest()
    return RowFile(path, tuple(rows), raw.lines, raw.blank, digest)


def _shown(path: Path, number: int, text: str, problem: Problem) -> str:
    # Escapes keep a stranger's file from steering the terminal.
    text = text.encode("unicode_escape").decode()
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    return f"{path}:{number}: {problem.reason}\n  row: {text}\n  fix: {problem.fix}"


def _refusal(path: Path, shown: list[str], count: int, read: int, raw: RawFile) -> str:
    more = [f"... and {count - len(shown)} more rows like these"] if count > len(shown) else []
    skipped = f" + {raw.blank} blank" if raw.blank else ""
    counts = f"{path}: {read} rows read + {count} refused{skipped} = {raw.lines} lines"
    return "\n".join([*shown, *more, counts])


def boolean_field(rows: tuple[Row, ...]) -> str | None:
    """Find the field that sorts rows into two groups, such as `known_schema`.

    Args:
      rows: Rows of a file.

    Returns:
      The name of the first field that is true or false in every row, or None.
    """
    for name in rows[0].fields if rows else ():
        if all(isinstance(row.fields.get(name), bool) for row in rows):
            return name
    return None
