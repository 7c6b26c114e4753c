"""Reads JSONL files: every row checked, every line accounted for, before anything is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_lora.data.formats import Problem, check_fields
from jax_lora.errors import DataError, explain

SHOWN_PROBLEMS = 10
SHOWN_CHARACTERS = 200
BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row of a file.

    Args:
      line: Its line, counted from 1.
      kind: `"completions"`, `"text"` or `"chat"`; found row by row, as files mix them.
      fields: The row as it stands in the file, extra fields and all.
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
      digest: A hash of the file, which tells whether it is the same as it was.
    """

    path: Path
    rows: tuple[Row, ...]
    lines: int
    blank: int
    digest: str = ""


def read_rows(path: str | Path) -> RowFile:
    r"""Read a JSONL file and check every row of it.

    Use it before anything slow happens: a bad row found after an hour of training is an hour lost.

    Args:
      path: A file with one JSON object a line. A byte order mark, CRLF and blank lines are fine.

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
    path = Path(path)
    content = _content(path)
    # Bytes, and only "\n" ends a line: text mode would also split at U+2028 inside a string.
    lines = content.removeprefix(BOM).removesuffix(b"\n").split(b"\n") if content else []
    rows: list[Row] = []
    refused: list[str] = []
    blank = 0
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            blank += 1
            continue
        parsed = _parse(raw, last=number == len(lines))
        parsed = parsed if isinstance(parsed, Problem) else check_fields(parsed)
        if isinstance(parsed, Problem):
            refused.append(_shown(path, number, raw, parsed))
        else:
            kind, fields = parsed
            rows.append(Row(number, kind, fields))
    if refused:
        raise DataError(_refusal(path, refused, len(rows), blank, len(lines)))
    if not rows:
        raise DataError(
            explain(
                str(path),
                got=f"no row in {len(lines)} lines",
                expected="at least one JSON object on a line of its own",
                fix='Write rows such as {"prompt": "...", "completion": "..."}.',
            )
        )
    return RowFile(path, tuple(rows), len(lines), blank, hashlib.sha256(content).hexdigest())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            explain(
                str(path),
                got=error.strerror or str(error),
                expected="a readable JSONL file",
                fix="Check the path given with --data.",
            )
        ) from error


def _parse(raw: bytes, *, last: bool) -> Any:
    """Parse one line into whatever JSON value it holds, or say what is wrong with it."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Problem(
            f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8",
            "Save the file as UTF-8.",
        )
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(raw.decode("utf-8").rstrip()) - 1
        if last and (at_end or error.msg.startswith("Unterminated string")):
            return Problem(
                "the last line ends in the middle of a JSON value: the file seems to be cut off",
                "Copy the file again, or delete the line.",
            )
        return Problem(
            f"not JSON: {error.msg} at character {error.colno}",
            "Put one whole JSON object on every line.",
        )
    except RecursionError:
        return Problem("nested too deeply", "Flatten the row.")
    except ValueError as error:  # an integer of thousands of digits
        return Problem(f"not JSON that can be read: {error}", "Shorten or quote the number.")


def _shown(path: Path, number: int, raw: bytes, problem: Problem) -> str:
    # Escapes keep a stranger's file from steering the terminal.
    text = raw.decode("utf-8", "backslashreplace").rstrip("\r").encode("unicode_escape").decode()
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    return f"{path}:{number}: {problem.reason}\n  row: {text}\n  fix: {problem.fix}"


def _refusal(path: Path, refused: list[str], read: int, blank: int, lines: int) -> str:
    shown = refused[:SHOWN_PROBLEMS]
    if len(refused) > len(shown):
        shown.append(f"... and {len(refused) - len(shown)} more rows like these")
    skipped = f" + {blank} blank" if blank else ""
    counts = f"{path}: {read} rows read + {len(refused)} refused{skipped} = {lines} lines"
    return "\n".join([*shown, counts])


def boolean_field(rows: tuple[Row, ...]) -> str | None:
    """Find the field that sorts rows into two groups, such as `known_schema`.

    Args:
      rows: Rows of a file.

    Returns:
      The name of the first field that is true or false in every row, or None.
    """
    candidates: Iterator[str] = iter(rows[0].fields) if rows else iter(())
    for name in candidates:
        if all(isinstance(row.fields.get(name), bool) for row in rows):
            return name
    return None
