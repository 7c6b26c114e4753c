"""Rows as they stand in files: JSONL, JSON, CSV, TSV and Parquet, gzipped or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax_lora.data.problem import Problem, kind_of
from jax_lora.errors import DataError, format_error

BOM = b"\xef\xbb\xbf"
MOST_BYTES = 8 * 2**30  # of a file as it is read
# Text shrinks to a tenth or so; what unpacks to so much more is made to fill the memory.
MOST_RATIO, FREE_BYTES = 200, 2**26
WIDEST_CELL = 2**24
LISTS = ("data", "rows", "train")  # under which a JSON object may have its list


class RawRow(NamedTuple):
    """A row before its fields are looked at.

    Attributes:
      number: Its line, or its number in a file without lines, from 1.
      shown: What a message shows of it.
      value: A JSON value, or why there is none.
    """

    number: int
    shown: str
    value: Any


class RawFile(NamedTuple):
    """What a file holds: its rows, and how many lines of it are blank."""

    rows: list[RawRow]
    lines: int
    blank: int


def read_content(path: Path) -> bytes:
    """Read a file whole, unpacked if it is gzipped.

    Args:
      path: The file.

    Returns:
      Its bytes.

    Raises:
      DataError: It cannot be read, is damaged, or is larger than anything that can be meant.
    """
    most = MOST_BYTES
    try:
        if path.suffix == ".gz":
            most = min(most, max(FREE_BYTES, MOST_RATIO * path.stat().st_size))
            with gzip.open(path) as file:
                content = file.read(most + 1)
        else:
            with path.open("rb") as file:
                content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        damaged = path.suffix == ".gz" and not isinstance(error, FileNotFoundError)
        got = f"a damaged gzip file: {error}" if damaged else getattr(error, "strerror", None)
        raise _unreadable(path, got or str(error), "Check the path of the data.") from error
    if len(content) > most:
        got = f"more than {most:,} bytes of text"
        raise _unreadable(path, got, "Unpack it, or cut it into several smaller files.")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _unreadable(path, "text in UTF-16", "Save the file as UTF-8.")
    return content.removeprefix(BOM)


def read_raw(path: Path, content: bytes) -> RawFile:
    """Read rows by the ending of the file's name.

    Args:
      path: The file; only its name is used.
      content: Its bytes, unpacked.

    Returns:
      The rows.

    Raises:
      DataError: The whole file is not of its kind.
    """
    return READERS[ending(path)](path, content)


def ending(path: Path) -> str:
    """Return what a file's name says of its format: `".jsonl"`, also for `rows.jsonl.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def is_row_file(path: Path) -> bool:
    """Tell whether rows can be read from a file of this name."""
    return ending(path) in READERS and not (ending(path) == ".parquet" and path.suffix == ".gz")


# -----------------------------------------------------------------------------------------------
# One function per kind of file
# -----------------------------------------------------------------------------------------------


def _jsonl(path: Path, content: bytes) -> RawFile:
    # Bytes, and only "\n" ends a line: text mode would also split at U+2028 inside a string.
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    rows = [
        RawRow(number, _text(raw), _parse(raw, last=number == len(lines)))
        for number, raw in enumerate(lines, start=1)
        if raw.strip()
    ]
    return RawFile(rows, len(lines), len(lines) - len(rows))


def _json(path: Path, content: bytes) -> RawFile:
    value = _parse(content, last=True) if content.strip() else []
    if isinstance(value, Problem):
        lines = _jsonl(path, content)  # many data sets call JSON Lines .json
        if lines.rows and isinstance(lines.rows[0].value, dict):
            return lines
    if isinstance(value, Problem):
        raise _unreadable(path, value.reason, value.fix)
    if isinstance(value, dict):
        value = next((value[key] for key in LISTS if key in value), value)
    if not isinstance(value, list):
        fix = "Write a list of rows; rows on lines of their own go into a .jsonl file."
        raise _unreadable(path, f"{kind_of(value)} where a list of rows is needed", fix)
    shown = (json.dumps(each, ensure_ascii=False)[:1000] for each in value)
    rows = [
        RawRow(n, text, each) for n, (text, each) in enumerate(zip(shown, value, strict=True), 1)
    ]
    return RawFile(rows, len(rows), 0)


def _table(delimiter: str) -> Callable[[Path, bytes], RawFile]:
    def read(path: Path, content: bytes) -> RawFile:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            got = f"byte 0x{content[error.start]:02x} on line {line} is not UTF-8"
            raise _unreadable(path, got, "Save the file as UTF-8.") from error
        csv.field_size_limit(WIDEST_CELL)
        lines = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        try:
            rows = list(_table_rows(lines))
        except csv.Error as error:
            fix = "Quote cells that hold quotes or breaks."
            raise _unreadable(path, f"line {lines.line_num}: {error}", fix) from error
        return RawFile(rows, len(rows), 0)

    return read


def _table_rows(lines: Any) -> Iterator[RawRow]:
    """The first line names the fields; blank ones are no rows."""
    heads: list[str] = next(lines, [])
    before = lines.line_num
    for cells in lines:
        number, before = before + 1, lines.line_num
        if not cells:
            continue
        shown = ",".join(cells)
        if len(cells) != len(heads):
            problem = Problem(
                f"{len(cells)} cells where the first line names {len(heads)}",
                "Quote cells that hold the separator.",
            )
            yield RawRow(number, shown, problem)
        else:
            yield RawRow(number, shown, dict(zip(heads, cells, strict=True)))


def _parquet(path: Path, content: bytes) -> RawFile:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        fix = "pip install 'jax-lora[parquet]'"
        raise _unreadable(path, "the package pyarrow is not installed", fix) from error
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > MOST_BYTES:
            raise _unreadable(path, "more than can be held", "Cut it into several smaller files.")
        values = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        fix = "Copy the file again."
        raise _unreadable(path, f"no Parquet file: {str(error)[:200]}", fix) from error
    plain = [{name: each for name, each in row.items() if each is not None} for row in values]
    rows = [RawRow(number, str(row)[:1000], row) for number, row in enumerate(plain, start=1)]
    return RawFile(rows, len(rows), 0)


READERS: dict[str, Callable[[Path, bytes], RawFile]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}


def _parse(raw: bytes, *, last: bool) -> Any:
    """Parse JSON, or say what is wrong with it."""
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


def _text(raw: bytes) -> str:
    return raw[:1000].decode("utf-8", "backslashreplace").rstrip("\r")


def _unreadable(path: Path, got: str, fix: str) -> DataError:
    kinds = ", ".join(READERS)
    return DataError(
        format_error(str(path), got=got, expected=f"a readable file of rows: {kinds}", fix=fix)
    )
