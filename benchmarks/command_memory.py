"""Measure the peak resident memory of commands that hold a model, each in a new process.

    python -m benchmarks.command_memory RUN

RUN is the run folder of an adapter; its base model should have a gigabyte or more, as Python, JAX
and the compiler alone take 0.2 to 0.4 GB. The time of a step is not the point: one token is
generated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks import report

_LOAD = "import sys; from jax_lora.models import load; load(sys.argv[1])"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="run folder of an adapter")
    run = parser.parse_args().run
    model = Path(yaml.safe_load((run / "config.yaml").read_text())["model"])
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=run) as scratch:
        adapter = ("--adapter-path", str(run))
        command = (sys.executable, "-m", "jax_lora")
        generate = ("generate", *adapter, "--prompt", "a", "--max-tokens", "1")
        fuse = ("fuse", *adapter, "--save-path", f"{scratch}/fused")
        rows = [
            ["load", peak(sys.executable, "-c", _LOAD, str(model))],
            ["generate", peak(*command, *generate)],
            ["fuse", peak(*command, *fuse)],
            ["fuse --check", peak(*command, *fuse, "--overwrite", "--check")],
        ]
    print(f"Files of the model: {size / 1e9:.2f} GB\n")
    print(report.table(["command", "peak GB"], rows))


def peak(*command: str) -> str:
    """Return the peak resident memory of a command, as text in gigabytes; exit if it fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"exit status {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return f"{usage.ru_maxrss * 1024 / 1e9:.2f}"


if __name__ == "__main__":
    main()
