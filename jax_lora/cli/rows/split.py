"""Split one data file into train, valid and test, reproducibly by seed."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from jax_lora.cli.parser import Parser
from jax_lora.cli.rows.check import check_new
from jax_lora.cli.rows.convert import written
from jax_lora.cli.rows.write_rows import add_paths
from jax_lora.data.data_folder import read_whole
from jax_lora.data.formats import unused_fields
from jax_lora.errors import ConfigError, DataError
from jax_lora.storage.atomic_writes import made_folder, replacing

HELP = "split one file into train, valid and test"
EXAMPLE = "jax-lora data split --data qa.jsonl --save-path qa --valid 0.1 --test 0.1"


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_paths(parser, "folder to create (required)", metavar="DIR")
    add = parser.section("data").add_argument
    add("--valid", type=float, default=0.05, metavar="P", help="fraction of the examples [0.05]")
    add("--test", type=float, default=0.05, metavar="P", help="fraction of the examples [0.05]")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the split [0]")


def run(options: argparse.Namespace) -> int:
    """Write the folder, and return the exit code."""
    fractions = {"valid": options.valid, "test": options.test}
    if min(fractions.values()) < 0 or sum(fractions.values()) >= 1:
        raise ConfigError(
            "--valid and --test",
            got=f"{options.valid:g} and {options.test:g}",
            expected="fractions of at least 0 with a sum below 1, to leave examples for train",
            fix="Use, for example, 0.05 for both.",
        )
    target = Path(options.save_path)
    check_new(target, "--save-path")
    rows = list(read_whole(options.data).rows)
    order = list(range(len(rows)))
    random.Random(options.seed).shuffle(order)
    start, files = 0, {}
    for name, fraction in (*fractions.items(), ("train", 1.0)):
        count = len(rows) - start if name == "train" else round(fraction * len(rows))
        chosen = sorted(order[start : start + count])
        start += count
        if chosen:
            lines = (unused_fields(rows[i].fields) | written(rows[i]) for i in chosen)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            files[name] = text, len(chosen)
    with made_folder(target.parent, DataError), replacing(target, DataError) as part:
        part.mkdir()
        for name, (text, _) in files.items():
            (part / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, (_, count) in files.items():
        print(f"{target / name}.jsonl: {count:,} examples")
    return 0
