"""Compare the memory that `jax-lora plan` prints with the peak memory of `jax-lora train`.

    python -m benchmarks.train_memory
    python -m benchmarks.train_memory --large    # Llama 3.2 1B's shapes as well: 8 GB

Each case writes a folder with a model in which every weight is 0.01, and runs both commands with
the same options, each in a new process that compiles, without the compilation cache. On a CPU, the
peak of `train` is the peak resident memory of its process: loading, compiling, two steps, one
batch of validation and a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.command_memory import peak
from benchmarks.plan_accuracy import Case, Larger, Largest
from jax_lora.bundled import model_path
from jax_lora.finetune.settings import TrainSettings
from jax_lora.models import save
from jax_lora.plan.planned_model import PlannedModel

_COMMAND = (sys.executable, "-m", "jax_lora")
_WEIGHT = 0.01
_EXAMPLES = {"train": 48, "valid": 16}


def _case(kind: type[Case], rows: int, length: int, dtype: str, remat: bool = False) -> Case:
    rank = 8 if kind is Largest else 32
    return kind(TrainSettings(rank=rank, batch_size=rows, grad_checkpoint=remat), length, 0, dtype)


CASES = {
    "bundled, 16 x 120": _case(Case, 16, 120, "float32"),
    "bundled, 16 x 120, remat": _case(Case, 16, 120, "float32", remat=True),
    "100M, 4 x 256": _case(Larger, 4, 256, "float32"),
    "100M, 4 x 256, remat": _case(Larger, 4, 256, "float32", remat=True),
    "100M, bfloat16, 4 x 256": _case(Larger, 4, 256, "bfloat16"),
    "100M, bfloat16, 4 x 256, remat": _case(Larger, 4, 256, "bfloat16", remat=True),
}
LARGE = {
    "1B, bfloat16, 2 x 128": _case(Largest, 2, 128, "bfloat16"),
    "1B, bfloat16, 2 x 512, remat": _case(Largest, 2, 512, "bfloat16", remat=True),
    "1B, 2 x 128": _case(Largest, 2, 128, "float32"),
}


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--large", action="store_true", help="also measure 1.2 G parameters")
    parser.add_argument("--case", help="measure only this case", choices=(*CASES, *LARGE))
    options = parser.parse_args()
    os.environ["JAX_LORA_NO_CACHE"] = "1"
    cases = CASES | LARGE if options.large or options.case else CASES
    head = ["step", "devices", "step GB", "process GB", "planned GB", "train GB", "planned / train"]
    rows = []
    for name in [options.case] if options.case else cases:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append([name, *measure(cases[name], Path(scratch))])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(report.table(head, rows))


def measure(case: Case, scratch: Path) -> list[str]:
    """Plan and train in a folder; return the cells of a row."""
    arguments = _arguments(case, scratch)
    planned = _planned(*arguments)
    compiled, process = planned["compiled"], planned["process"]
    step = compiled["peak"] * compiled["devices"]
    run = ("--adapter-path", str(scratch / "run"), "--progress", "none")
    short = ("--iters", "2", "--val-batches", "1")
    measured = float(peak(*_COMMAND, "train", *arguments, *run, *short))
    total = (step + process) / 1e9
    sizes = [f"{size:.2f}" for size in (step / 1e9, process / 1e9, total, measured)]
    return [str(compiled["devices"]), *sizes, f"{total / measured:.3f}"]


def _arguments(case: Case, scratch: Path) -> tuple[str, ...]:
    """Write the model and the data; return the arguments of both commands."""
    settings = case.settings
    _write_model(case.model(), scratch / "model")
    _write_data(scratch / "data", case.length)
    sizes = {"rank": settings.rank, "batch-size": settings.batch_size, "dtype": case.dtype}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    flags += ["--grad-checkpoint"] * settings.grad_checkpoint
    flags += ["--max-seq-length", str(case.length), "--data", str(scratch / "data")]
    return str(scratch / "model"), *flags


def _write_model(model: PlannedModel, folder: Path) -> None:
    """Write a model's weights, which share one element in memory, and the bundled tokenizer."""
    shutil.copytree(model_path(), folder, ignore=shutil.ignore_patterns("config.json", "model.*"))

    def fill(leaf: Any) -> Any:
        return np.broadcast_to(np.asarray(_WEIGHT, leaf.dtype), leaf.shape)

    save(folder, model.module, jax.tree.map(fill, model.variables["params"]))


def _write_data(folder: Path, length: int) -> None:
    """Write texts of more than `length` tokens."""
    folder.mkdir()
    line = json.dumps({"text": "select a from b " * length}) + "\n"
    for split, count in _EXAMPLES.items():
        (folder / f"{split}.jsonl").write_text(line * count, encoding="utf-8")


def _planned(*arguments: str) -> dict[str, Any]:
    command = [*_COMMAND, "plan", *arguments, "--save-path", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
