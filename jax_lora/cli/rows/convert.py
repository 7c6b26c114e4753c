"""Convert a data file of any kind to JSON Lines of one format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jax_lora.cli.rows.check import check_new
from jax_lora.data.rows import Row, read_rows
from jax_lora.errors import DataError, format_error

HELP = "convert a data file to JSON Lines of one format"
FORMS = ("chat", "completions", "text")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add = parser.add_argument
    add("data", metavar="FILE", help="data file of any format")
    add("-o", "--output", metavar="FILE", required=True, help="the new .jsonl file")
    add("--to", choices=FORMS, help="format of the new file [unchanged]")


def run(options: argparse.Namespace) -> int:
    """Write the file, and return the exit code."""
    target = Path(options.output)
    check_new(target, "--output")
    file = read_rows(options.data)
    rows = []
    for row in file.rows:
        form = _in_form(row, options.to or row.kind)
        if form is None:
            raise DataError(
                format_error(
                    f"{file.path}:{row.line}",
                    got=f"a row of the form {row.kind}",
                    expected=f"one that can be written as {options.to}",
                    fix="Leave --to out, or convert such rows by themselves.",
                )
            )
        rows.append(form)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    target.write_text("".join(lines), encoding="utf-8")
    print(f"{target}: {len(rows):,} rows")
    return 0


def _in_form(row: Row, form: str) -> dict[str, Any] | None:
    """A row in another form, where nothing of it is lost that way."""
    fields = row.fields
    if form == row.kind:
        return _only_own(row)
    if form == "chat" and row.kind == "completions":
        return {
            "messages": [
                {"role": "user", "content": fields["prompt"]},
                {"role": "assistant", "content": fields["completion"]},
            ]
        }
    if form == "text" and row.kind == "completions":
        return {"text": fields["prompt"] + fields["completion"]}
    if form == "completions" and row.kind == "chat":
        roles = [turn["role"] for turn in fields["messages"]]
        if roles == ["user", "assistant"] and not fields.get("tools"):
            prompt, completion = (turn["content"] for turn in fields["messages"])
            return {"prompt": prompt, "completion": completion}
    return None


def _only_own(row: Row) -> dict[str, Any]:
    """The fields of the row's form; a completion of turns stays one."""
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
