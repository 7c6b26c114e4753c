"""Convert a data file to one format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jax_lora.cli.parser import Parser
from jax_lora.cli.rows.check import check_new
from jax_lora.cli.rows.write_rows import add_paths, writer
from jax_lora.data.data_folder import read_whole
from jax_lora.data.rows import Row
from jax_lora.errors import DataError
from jax_lora.storage.atomic_writes import write_file

HELP = "convert a data file to one format"
EXAMPLE = "jax-lora data convert --data qa.csv --save-path qa.jsonl --to chat"
FORMATS = ("chat", "completions", "text")


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_paths(parser, ".jsonl, .json, .csv or .tsv file to write (required)", metavar="FILE")
    add = parser.section("data").add_argument
    add("--to", choices=FORMATS, help="format of the output [unchanged]")


def run(options: argparse.Namespace) -> int:
    """Write the file, and return the exit code."""
    target = Path(options.save_path)
    check_new(target, "--save-path")
    write = writer(target)
    file = read_whole(options.data)
    rows = []
    for row in file.rows:
        converted = _convert(row, options.to or row.kind)
        if converted is None:
            raise DataError(
                f"{file.path}:{row.line}",
                got=f"an example in the format {row.kind}",
                expected=f"an example that can be converted to {options.to}",
                fix="Remove --to, or move such examples to another file.",
            )
        rows.append(converted)
    write_file(target, write(target, rows), DataError)
    print(f"{target}: {len(rows):,} examples")
    return 0


def _convert(row: Row, to: str) -> dict[str, Any] | None:
    """Convert an example; None if the other format cannot represent it."""
    fields = row.fields
    if to == row.kind or (to, row.kind) == ("text", "document"):
        return written(row)
    if to == "chat" and row.kind == "completions":
        question = {"role": "user", "content": fields["prompt"]}
        answer = {"role": "assistant", "content": fields["completion"]}
        return {"messages": fields.get("turns") or [question, answer]}
    if to == "text" and row.kind == "completions":
        return {"text": fields["prompt"] + fields["completion"]}
    if to == "completions" and row.kind == "chat":
        turns = fields["messages"]
        plain = all({*turn} == {"role", "content"} for turn in turns) and not fields.get("tools")
        if [turn["role"] for turn in turns] == ["user", "assistant"] and plain:
            prompt, completion = (turn["content"] for turn in turns)
            return {"prompt": prompt, "completion": completion}
    return None


def written(row: Row) -> dict[str, Any]:
    """Return the fields of the example's format; a completion of turns stays one."""
    fields = row.fields
    if row.kind == "completions":
        return {"prompt": fields["prompt"], "completion": fields["completion"]}
    if row.kind == "labeled":
        names = ("text", "text_a", "text_b", "label")
        return {name: fields[name] for name in names if name in fields}
    if row.kind != "chat":
        return {"text": fields["text"]}
    tools = {"tools": fields["tools"]} if fields.get("tools") else {}
    turns, first = fields["messages"], fields.get("learn_from", 0)
    if first:
        return {"prompt": turns[:first], "completion": turns[first:], **tools}
    return {"messages": turns, **tools}
