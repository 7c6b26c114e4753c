"""Split one data file into train, valid and test, reproducibly by seed."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from jax_lora.cli.rows.check import check_new
from jax_lora.data.rows import read_rows
from jax_lora.errors import ConfigError, format_error

HELP = "split one file into train, valid and test"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add = parser.add_argument
    add("data", metavar="FILE", help="data file of any format")
    add("-o", "--output", metavar="DIR", required=True, help="the new folder")
    add("--valid", type=float, default=0.05, metavar="P", help="share of the examples [0.05]")
    add("--test", type=float, default=0.05, metavar="P", help="share of the examples [0.05]")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the split [0]")


def run(options: argparse.Namespace) -> int:
    """Write the folder, and return the exit code."""
    shares = {"valid": options.valid, "test": options.test}
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise ConfigError(
            format_error(
                "--valid and --test",
                got=f"{options.valid:g} and {options.test:g}",
                expected="shares of the rows, from 0 on, that leave some for training",
                fix="Take 0.05 each, say.",
            )
        )
    target = Path(options.output)
    check_new(target, "--output")
    rows = list(read_rows(options.data).rows)
    order = list(range(len(rows)))
    random.Random(options.seed).shuffle(order)
    target.mkdir(parents=True)
    start = 0
    for name, share in (*shares.items(), ("train", 1.0)):
        count = len(rows) - start if name == "train" else round(share * len(rows))
        chosen = sorted(order[start : start + count])
        start += count
        if chosen:
            own = ("learn_from", "tools")
            lines = ({k: v for k, v in rows[i].fields.items() if k not in own or v} for i in chosen)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (target / f"{name}.jsonl").write_text(text, encoding="utf-8")
            print(f"{target / name}.jsonl: {len(chosen):,} rows")
    return 0
