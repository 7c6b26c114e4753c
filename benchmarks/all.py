"""Run every benchmark and rewrite the tables of docs/performance.md and docs/benchmark_tables.md.

Usage:

    python -m benchmarks.all             # about an hour on two idle cores
    python -m benchmarks.all --rounds 0  # only the deterministic tables
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import subprocess
import sys

SUMMARY, TABLES = pathlib.Path("docs/performance.md"), pathlib.Path("docs/benchmark_tables.md")
IN_SUMMARY = ("bars", "versus_peft", "init_time")

STEPS = (
    "", "--size 768x4", "--scan", "--remat dots-no-batch",
    "--remat dots-no-batch --order least-memory", "--scan --remat dots-no-batch",
    "--scan --remat full",
)  # fmt: skip
TIMED = ("compile_time --rounds 5", "init_time", "profile_step --steps 20")


def main() -> None:
    """Run each benchmark in a new process, so that they share no compilation cache."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--rounds", type=int, default=11, help="timing rounds of training steps; 0: no timing"
    )
    options = parser.parse_args()
    failed = [command for command in commands(options.rounds) if not _run(command)]
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def commands(rounds: int) -> list[str]:
    """Return the commands in the order of the document."""
    listed = [f"bars --rounds {rounds}"]
    listed += [f"train_step {step} --rounds {rounds}" for step in STEPS]
    if rounds and importlib.util.find_spec("torch") and importlib.util.find_spec("peft"):
        listed += [f"versus_peft --rounds {rounds}"]
    return [*listed, *TIMED] if rounds else listed


def _run(command: str) -> bool:
    script, *rest = command.split()
    document = SUMMARY if script in IN_SUMMARY else TABLES
    line = [sys.executable, "-m", f"benchmarks.{script}", *rest, "--markdown", str(document)]
    print(f"\n$ {' '.join(line)}", flush=True)
    return subprocess.run(line, check=False).returncode == 0


if __name__ == "__main__":
    main()
