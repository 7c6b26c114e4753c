"""Run every benchmark and rewrite the tables of docs/performance.md.

For example:

python -m benchmarks.all             # about an hour on two cores; leave the machine alone
python -m benchmarks.all --rounds 0  # only the tables that repeat exactly
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import subprocess
import sys

DOCUMENT = pathlib.Path("docs/performance.md")

STEPS = (
    "", "--size 768x4", "--scan", "--remat dots-no-batch",
    "--remat dots-no-batch --order least-memory", "--scan --remat dots-no-batch",
    "--scan --remat full",
)  # fmt: skip
TIMED = ("compile_time --rounds 5", "init_time", "profile_step --steps 20")


def main() -> None:
    """Run each in a process of its own, so that none finds what another has compiled."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=11, help="of steps; 0: no times at all")
    options = parser.parse_args()
    failed = [command for command in commands(options.rounds) if not _run(command)]
    if failed:
        raise SystemExit("\n".join(["these failed:", *failed]))


def commands(rounds: int) -> list[str]:
    """List the commands in the order of the document."""
    listed = [f"bars --rounds {rounds}"]
    listed += [f"train_step {step} --rounds {rounds}" for step in STEPS]
    if rounds and importlib.util.find_spec("torch") and importlib.util.find_spec("peft"):
        listed += [f"versus_peft --rounds {rounds}"]
    return [*listed, *TIMED] if rounds else listed


def _run(command: str) -> bool:
    script, *rest = command.split()
    line = [sys.executable, "-m", f"benchmarks.{script}", *rest, "--markdown", str(DOCUMENT)]
    print(f"\n$ {' '.join(line)}", flush=True)
    return subprocess.run(line, check=False).returncode == 0


if __name__ == "__main__":
    main()
