"""SIGKILL at random moments: what is on the disk is complete, and the run goes on to the bit.

`JAX_LORA_KILLS` sets the number of kills; the default keeps the suite short.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jax_lora as jl
from jax_lora.finetune.commit_mark import check_mark
from jax_lora.finetune.run_folder import checkpoints_of
from jax_lora.finetune.training_state import find_resumable
from tests.attacks.saving_process import BASE, adapter_digest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("JAX_LORA_KILLS", "40"))


def start(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.attacks.saving_process", str(folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


@pytest.mark.slow
def test_a_killed_run_is_complete_and_goes_on_to_the_bit(tmp_path):
    draw, seen, starting = random.Random(0), {}, start(tmp_path)
    for _ in range(KILLS):
        child = starting
        first = child.stdout.readline()
        assert first, child.stderr.read()
        time.sleep(draw.uniform(0, 0.8))
        child.send_signal(signal.SIGKILL)
        lines = [first, *child.stdout.read().splitlines()]
        child.wait()
        child.stdout.close()
        child.stderr.close()
        for step, found in (line.split() for line in lines if len(line.split()) == 2):
            assert seen.setdefault(int(step), found) == found, step
        checkpoint = find_resumable(tmp_path / "run")
        step = int(checkpoint.name[5:])
        assert step >= int(lines[0].split()[0])
        for name in checkpoints_of(tmp_path / "run"):
            check_mark(tmp_path / "run" / name, required=True)
            found = adapter_digest(tmp_path / "run" / name)
            assert seen.setdefault(int(name[5:]), found) == found
        jl.load_adapter(checkpoint, base=BASE)
        jl.load_adapter(tmp_path / "adapter", base=BASE)
        assert adapter_digest(tmp_path / "adapter") in seen.values()
        starting = start(tmp_path)
    starting.kill()
    starting.communicate()
    assert len(seen) >= KILLS
    left = [each.name for each in (tmp_path / "run").iterdir()]
    assert len(left) < 12, left
