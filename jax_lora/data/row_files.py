"""Rows as they stand in files: JSONL, JSON, CSV, TSV and Parquet, gzipped or not."""

from __future__ import annotations

import codecs
import collections
import csv
import gzip
import io
import json
import reprlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax_lora.data.parquet_rows import BYTES_OF_EXAMPLE, parquet_rows
from jax_lora.data.problem import Problem, kind_of
from jax_lora.data.table_text import read_table_text, table_separator
from jax_lora.errors import DataError, install_command
from jax_lora.storage.json_files import TooDeepError, check_depth, unique_keys
from jax_lora.storage.limits import expanded_limit, limit, limit_hint

BOM = b"\xef\xbb\xbf"
WIDEST_CELL = 2**24
BYTES_OF_VALUE = 64  # in memory, of a short one
GZIP = b"\x1f\x8b"
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

    Raises:
      DataError: It cannot be read, is damaged, or is larger than anything that can be meant.
    """
    name, most = "data_bytes", limit("data_bytes")
    try:
        if path.suffix == ".gz":
            expanded = expanded_limit(path.stat().st_size)
            name, most = ("expansion", expanded) if expanded < most else (name, most)
            with gzip.open(path) as file:
                content = file.read(most + 1)
        else:
            with path.open("rb") as file:
                content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        damaged = path.suffix == ".gz" and not isinstance(error, FileNotFoundError)
        got = f"a damaged gzip file: {error}" if damaged else getattr(error, "strerror", None)
        raise _unreadable(path, got or str(error), "Check the path of the data.") from error
    if len(content) > most or (path.suffix == ".gz" and _parsed_size(content) > most):
        raise _unreadable(path, f"more than {most:,} bytes of text and values", limit_hint(name))
    if content.startswith(GZIP):
        fix = f"Rename it to {path.name}.gz" if path.suffix != ".gz" else "Unpack it once"
        raise _unreadable(path, "gzipped bytes", f"{fix}.")
    is_table = ending(path) in (".csv", ".tsv")
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and not is_table:
        raise _unreadable(path, "text in UTF-16", "Save the file as UTF-8.")
    return content.removeprefix(BOM)


def _parsed_size(content: bytes) -> int:
    """Estimate the memory of the examples in a text: short ones take far more than their text."""
    lines, values = content.count(b"\n"), content.count(b",")
    return len(content) + BYTES_OF_EXAMPLE * lines + BYTES_OF_VALUE * values


def read_raw(path: Path, content: bytes) -> RawFile:
    """Read rows by the ending of the file's name; of another name, JSON Lines.

    Raises:
      DataError: The whole file is not of its kind.
    """
    return READERS.get(ending(path), _jsonl)(path, content)


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
    if content.lstrip().startswith(b"["):  # the name of JSON Lines, and a list of rows
        listed = _parse(content, last=True)
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            return _rows_of(listed)
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
        raise _unreadable(path, value.reason, value.fix)
    if isinstance(value, dict):
        value = next((value[key] for key in LISTS if key in value), value)
    if not isinstance(value, list):
        fix = "Write a list of rows; rows on lines of their own go into a .jsonl file."
        raise _unreadable(path, f"{kind_of(value)} where a list of rows is needed", fix)
    return _rows_of(value)


def _rows_of(values: list[Any], show: Callable[[Any], str] | None = None) -> RawFile:
    show = show or (lambda value: json.dumps(value, ensure_ascii=False)[:1000])
    rows = [RawRow(number, show(each), each) for number, each in enumerate(values, start=1)]
    return RawFile(rows, len(rows), 0)


def _table(path: Path, content: bytes) -> RawFile:
    try:
        text = read_table_text(content)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        got = f"byte 0x{content[error.start]:02x} on line {line} is not UTF-8"
        raise _unreadable(path, got, "Save the file as UTF-8.") from error
    csv.field_size_limit(WIDEST_CELL)
    separator, text = table_separator(text, "\t" if ending(path) == ".tsv" else ",")
    lines = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    try:
        rows = list(_table_rows(lines))
    except csv.Error as error:
        fix = "Quote cells that hold quotes or breaks, and name every column once."
        raise _unreadable(path, f"line {lines.line_num}: {error}", fix) from error
    return RawFile(rows, len(rows), 0)


def _table_rows(lines: Any) -> Iterator[RawRow]:
    """The first line names the fields; blank ones are no rows."""
    heads: list[str] = next(lines, [])
    twice = [name for name, count in collections.Counter(heads).items() if name and count > 1]
    if twice:
        raise csv.Error(f"two columns have the name {twice[0]!r:.80}")
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
        values = parquet_rows(path, content)
    except ImportError as error:
        fix = install_command("parquet")
        raise _unreadable(path, "the package pyarrow is not installed", fix) from error
    shown = reprlib.Repr()  # without the whole text of a long row
    shown.maxdict, shown.maxlist, shown.maxstring = 20, 10, 300
    return _rows_of([_without_nulls(row) for row in values], shown.repr)


def _without_nulls(value: Any) -> Any:
    """Remove the nulls that Arrow adds, as all objects of a column have the same fields."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path, bytes], RawFile]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".jsonlines": _jsonl,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}


def _parse(raw: bytes, *, last: bool) -> Any:
    """Parse JSON, or say what is wrong with it."""
    try:
        text = raw.decode("utf-8")
        check_depth(text)
        return json.loads(text, object_pairs_hook=unique_keys)
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
    except (TooDeepError, RecursionError):
        return Problem("nested too deeply", f"Flatten the row. {limit_hint('json_depth')}")
    except ValueError as error:  # a duplicate key, or an integer of thousands of digits
        fix = "Keep one of two equal keys; shorten or quote a long number."
        return Problem(f"not JSON that can be read: {error}", fix)


def _text(raw: bytes) -> str:
    return raw[:1000].decode("utf-8", "backslashreplace").rstrip("\r")


def _unreadable(path: Path, got: str, fix: str) -> DataError:
    kinds = ", ".join(READERS)
    return DataError(str(path), got=got, expected=f"a readable file of rows: {kinds}", fix=fix)
