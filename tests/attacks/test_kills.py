"""SIGKILL at random moments: what is on the disk is complete, and the run goes on to the bit.

`JAX_LORA_KILLS` sets the number of kills of the trainer; the default keeps the suite short. Many
kills are spread over several runs, which the processes of `pytest -n` take one after another.
"""

import dataclasses
import json
import os
import random
import time

import pytest

import jax_lora as jl
from jax_lora.finetune.commit_mark import check_mark
from jax_lora.finetune.run_folder import checkpoints_of
from jax_lora.finetune.training_state import find_resumable
from jax_lora.models import Llama, save
from jax_lora.peft.adapter_config import CONFIG
from jax_lora.peft.load import WEIGHTS
from tests.attacks.forked_processes import forks, state_of_parent  # noqa: F401
from tests.attacks.saving_process import (
    BASE,
    PEFT_NAMES,
    adapter_digest,
    peft_adapter,
    save_peft,
    save_without_end,
)
from tests.attacks.training_command import run_command
from tests.tiny_model import TINY, random_params, write_tokenizer

STEPS = 40  # of the command
ONE_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)
KILLS = int(os.environ.get("JAX_LORA_KILLS", "40"))
RUNS = -(-KILLS // 100)


@pytest.mark.slow
def test_the_process_that_forks_has_one_thread(forks):  # noqa: F811
    child = forks(state_of_parent)
    assert child.line() == "1"
    child.join()


@pytest.mark.slow
@pytest.mark.parametrize("run", range(RUNS))
def test_a_killed_run_is_complete_and_goes_on_to_the_bit(run, tmp_path, forks):  # noqa: F811
    draw, seen, kills = random.Random(run), {}, len(range(run, KILLS, RUNS))
    starting = forks(save_without_end, tmp_path)
    for _ in range(kills):
        first = starting.line()
        assert first, "the run ended"
        time.sleep(draw.uniform(0, 0.4))  # a few checkpoints
        for step, found in (line.split() for line in [first, *starting.kill()]):
            assert seen.setdefault(int(step), found) == found, step
        checkpoint = find_resumable(tmp_path / "run")
        step = int(checkpoint.name[5:])
        assert step >= int(first.split()[0])
        for name in checkpoints_of(tmp_path / "run"):
            check_mark(tmp_path / "run" / name, required=True)
            found = adapter_digest(tmp_path / "run" / name)
            assert seen.setdefault(int(name[5:]), found) == found
        jl.load_adapter(checkpoint, base=BASE)
        jl.load_adapter(tmp_path / "adapter", base=BASE)
        assert adapter_digest(tmp_path / "adapter") in seen.values()
        starting = forks(save_without_end, tmp_path)
    starting.kill()
    assert len(seen) >= kills
    left = [each.name for each in (tmp_path / "run").iterdir()]
    assert len(left) < 12, left


@pytest.mark.slow
def test_a_killed_command_is_resumed_and_ends_with_the_same_adapter(tmp_path, forks):  # noqa: F811
    model, llama = write_tokenizer(tmp_path / "model"), Llama(ONE_LAYER)
    save(model, llama, random_params(llama))
    lines = (
        json.dumps({"prompt": f"how many {n % 10}?", "completion": f" {n % 7}"}) for n in range(40)
    )
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    words = ["train", str(model), "--data", str(tmp_path / "train.jsonl"), "--rank", "2"]
    words += ["--iters", str(STEPS), "--targets", "q_proj", "--val-batches", "0"]
    words += ["--dropout", "0.1", "--progress", "json", "--adapter-path"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    child = forks(run_command, [*words, str(whole)])
    assert list(iter(child.line, None))[-1] == "0"
    child.join()
    first = [*words, str(run), "--save-every", "1"]
    resumed = ["train", "--resume", str(run), "--progress", "json"]
    draw = random.Random(0)
    for kill in range(5):
        words = resumed if checkpoints_of(run) else first
        child = forks(run_command, words)
        if kill % 3:  # the others are killed while they start
            next(line for line in iter(child.line, None) if '"saved"' in line)
        time.sleep(draw.uniform(0, 0.3 if kill % 3 else 2))
        child.kill()
        for name in checkpoints_of(run):
            check_mark(run / name, required=True)
    child = forks(run_command, resumed)
    assert list(iter(child.line, None))[-1] == "0"
    child.join()
    last = f"step-{STEPS:06d}"
    assert adapter_digest(run / last) == adapter_digest(whole / last)


@pytest.mark.slow
def test_a_killed_save_for_peft_leaves_the_old_or_the_new_adapter(tmp_path, forks):  # noqa: F811
    found = []
    for calls in range(20):
        folder = tmp_path / str(calls)
        jl.peft.save(folder, peft_adapter(2), names=PEFT_NAMES)
        child = forks(save_peft, folder, 3, calls)
        lines = list(iter(child.line, None))
        child.join()
        pair = jl.peft.load(folder, BASE, names=PEFT_NAMES).pairs["kernel"]
        found.append(int(pair.a[0, 0]))
        assert pair.a.shape[1] == pair.b[0, 0] == pair.scale == found[-1]
        if lines:
            break
    assert found == sorted(found) and set(found) == {2, 3} and len(found) > 5
    assert {each.name for each in folder.iterdir()} == {WEIGHTS, CONFIG}
