"""Write examples to a file of the kind that its name says."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_lora.cli.names import add_name
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError, DataError

Fields = dict[str, Any]


def add_paths(parser: Parser, text: str, metavar: str) -> None:
    """Add the options for the data to read, and for the file or folder to write."""
    data = "data file of any format, or texts: a folder or a file (required)"
    add_name(parser, "--data", data, metavar="PATH", required=True)
    add_name(parser, "--save-path", text, metavar=metavar, required=True)


def writer(target: Path) -> Callable[[Path, Sequence[Fields]], str]:
    """Return the function that makes the text of a file from its name and its examples.

    Raises:
      ConfigError: No such file can be written.
    """
    if target.suffix.lower() not in _WRITERS:
        raise ConfigError(
            f"--save-path {target}",
            got=f"a file that ends in {target.suffix!r}",
            expected=" or ".join(_WRITERS),
            fix="Choose another name, such as rows.jsonl.",
        )
    return _WRITERS[target.suffix.lower()]


def _jsonl(target: Path, rows: Sequence[Fields]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _json(target: Path, rows: Sequence[Fields]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def _table(target: Path, rows: Sequence[Fields]) -> str:
    heads = list(rows[0])
    for row in rows:
        if list(row) != heads or not all(isinstance(value, str) for value in row.values()):
            raise DataError(
                f"--save-path {target}",
                got="examples with lists, or with different fields",
                expected="a table: the same fields with strings in every example",
                fix="Write a .jsonl file, or convert with --to completions.",
            )
    text = io.StringIO()
    separator = "\t" if target.suffix.lower() == ".tsv" else ","
    # The carriage return inside a cell is kept only if the cell is quoted.
    lines = csv.writer(text, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator="\n")
    lines.writerows([heads, *(row.values() for row in rows)])
    return text.getvalue()


_WRITERS = {".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table}
