"""`jax-lora train --distributed` with several processes on this machine."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jax_lora.finetune.run_folder import checkpoints_of
from jax_lora.finetune.training_state import find_resumable
from jax_lora.models import Llama, save
from tests.tiny_model import TINY, random_params, write_tokenizer
from tests.xla_flags import for_devices

DEVICES = 4  # of all processes together
LIMIT = 300  # seconds after which every process is killed
# What the library of collectives prints; its threads write into each other's lines.
GLOO = re.compile(r"\[Gloo\]|peer ranks|is connected to|^[\s\d]*$")
OPTIONS = "--rank 2 --batch-size 8 --lr-schedule constant --warmup 0 --steps-per-report 1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and data, in which the processes run."""
    folder = tmp_path_factory.mktemp("hosts")
    model = Llama(TINY)
    save(write_tokenizer(folder / "model"), model, random_params(model))
    for split, count in (("train", 18), ("valid", 7)):
        rows = [{"prompt": f"how many {n}?", "completion": f" count {n}"} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Processes:
    """The processes of one command, each with its part of the devices."""

    def __init__(self, folder, count, *words, seeds=(), slurm=False):
        self.folder, self.count, self.started = folder, count, []
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": for_devices(DEVICES // count),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        }
        self.outputs = [folder / f"{port}-{index}.txt" for index in range(count)]
        for index, output in enumerate(self.outputs):
            joined = ["--distributed", "auto" if slurm else f"localhost:{port},{count},{index}"]
            if count == 1:
                joined = []
            variables = slurm_step(port, count, index) if slurm else {}
            seed = ["--seed", str(seeds[index])] if seeds else []
            command = [sys.executable, "-m", "jax_lora", *words, *seed, *joined]
            with output.open("w") as file:
                self.started.append(
                    subprocess.Popen(
                        command,
                        cwd=folder,
                        env=self.environment | variables,
                        stdout=file,
                        stderr=file,
                    )
                )

    def codes(self):
        """Wait for all processes, and return their exit codes."""
        deadline = time.monotonic() + LIMIT
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.1))
        return [process.poll() for process in self.started]

    def texts(self):
        """Return the output of each process, without the lines of the collectives library."""
        lines = [output.read_text().splitlines() for output in self.outputs]
        return ["\n".join(x for x in each if not GLOO.search(x)) for each in lines]

    def wait_for(self, file):
        deadline = time.monotonic() + LIMIT
        while not file.exists():
            assert time.monotonic() < deadline, "\n".join(self.texts())
            assert all(process.poll() is None for process in self.started), self.texts()
            time.sleep(0.1)


def slurm_step(port, count, index):
    """Return the variables by which JAX recognizes a process of `srun`."""
    values = {"STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": index, "LOCALID": index}
    named = {f"SLURM_{name}": str(value) for name, value in values.items()}
    return named | {"SLURM_JOB_ID": "1", "JAX_COORDINATOR_PORT": str(port)}


@pytest.fixture
def start(folder):
    running = []

    def start(count, *words, **more):
        running.append(Processes(folder, count, *words, **more))
        return running[-1]

    yield start
    for process in (process for each in running for process in each.started):
        process.kill()
        process.wait()


@pytest.fixture
def train(start):
    def train(count, run, *words, **more):
        command = ("train", "model", "--data", ".", "--adapter-path", run, *OPTIONS, *words)
        return start(count, *command, **more)

    return train


def losses(run):
    """Return training and validation losses by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (row["iter"], name, row[name])
        for row in rows
        for name in ("train_loss", "val_loss")
        if name in row
    ]


def values(run):
    return np.array([value for *_, value in losses(run)])


@pytest.fixture(scope="module")
def alone(folder):
    """The losses of one process that trains six steps on all devices."""
    words = ["--iters", "6", "--steps-per-eval", "2", "--mesh", "data=4"]
    command = ["train", "model", "--data", ".", "--adapter-path", "one", *OPTIONS, *words]
    one = Processes(folder, 1, *command)
    try:
        assert one.codes() == [0], one.texts()
    finally:
        one.started[0].kill()
    return values(folder / "one")


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_resume_in_one(train, folder, alone):
    short = ("--steps-per-eval", "2", "--sample-prompt", "how many")
    both = train(2, "two", "--iters", "4", *short)
    assert both.codes() == [0, 0], both.texts()
    first, second = both.texts()
    assert "Iter 4: Train loss" in first and "how many" in first and second == ""
    assert checkpoints_of(folder / "two") == ["step-000002", "step-000004"]
    one = train(1, "two", "--resume", "--iters", "6", "--mesh", "data=4", *short)
    assert one.codes() == [0], one.texts()
    assert "4 of 6 steps are done" in one.texts()[0]
    assert len(alone) == 9
    np.testing.assert_allclose(values(folder / "two"), alone, rtol=1e-5)


@pytest.mark.slow
def test_four_processes_shard_the_model_and_have_the_losses_of_one(train, folder, alone):
    words = ("--iters", "6", "--steps-per-eval", "2", "--mesh", "data=2,fsdp=2")
    four = train(4, "four", *words)
    assert four.codes() == [0] * 4, four.texts()
    np.testing.assert_allclose(values(folder / "four"), alone, rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_after_the_same_step(train, folder):
    both = train(2, "stopped", "--iters", "1000000", "--save-every", "5")
    both.wait_for(folder / "stopped" / "step-000005")
    both.started[1].send_signal(signal.SIGTERM)
    assert both.codes() == [130, 130], both.texts()
    steps = int(re.search(r"SIGTERM: stopped after (\d+) steps", both.texts()[0])[1])
    assert checkpoints_of(folder / "stopped")[-1] == f"step-{steps:06d}"
    assert both.texts()[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_process_ends_the_other_and_its_checkpoint_stays(train, folder, dies):
    run = folder / f"killed-{dies}"
    both = train(2, run.name, "--iters", "1000000", "--save-every", "5")
    both.wait_for(run / "step-000005")
    both.started[dies].kill()
    began = time.monotonic()
    codes = both.codes()
    assert time.monotonic() - began < 30
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 5, both.texts()
    said = both.texts()[1 - dies]
    assert f"[process {1 - dies}] error: process {dies}" in said and "--resume" in said
    assert find_resumable(run) is not None


@pytest.mark.slow
def test_processes_with_other_options_are_refused_in_each_of_them(folder, train):
    both = train(2, "differ", "--iters", "2", seeds=(0, 1))
    assert both.codes() == [2, 2], both.texts()
    for index, said in enumerate(both.texts()):
        assert f"[process {index}] error: the processes of this run" in said
        assert "the command's options: process 1 differs from process 0" in said
    assert not (folder / "differ").exists()


@pytest.mark.slow
def test_all_processes_learn_that_the_first_cannot_write(folder, train):
    (folder / "taken").write_text("mine")
    both = train(2, "taken", "--iters", "2")
    assert both.codes() == [2, 2], both.texts()
    for index, said in enumerate(both.texts()):
        assert f"[process {index}] error:" in said and "the run folder taken" in said
    assert (folder / "taken").read_text() == "mine"


@pytest.mark.slow
def test_the_doctor_adds_over_all_devices_of_slurm_and_prints_the_map(start):
    both = start(2, "doctor", slurm=True)
    assert both.codes() == [0, 0], both.texts()
    first, second = both.texts()
    lines = first.splitlines()
    assert re.match(r"\s+0  \S+\s+2 x cpu", lines[1]) and re.match(r"\s+1  ", lines[2])
    assert lines[-1] == "The sum of 1 to 4 over all devices is 10, as expected."
    assert second == ""
