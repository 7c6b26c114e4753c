"""A run that is resumed at any of its steps ends as the run that was never stopped."""

import dataclasses
import json
import shutil

import jax
import pytest

from jax_lora.cli import main
from jax_lora.finetune.step_cache import StepCache
from jax_lora.models import Llama, save
from tests.tiny_model import TINY, random_params, write_tokenizer

STEPS = 30
ONE_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def final(run):
    """Digests of the adapter, and everything that was counted but time."""
    step = run / f"step-{STEPS:06d}"
    pairs = json.loads((step / "adapter.json").read_text())["pairs"]
    progress = json.loads((step / "training.json").read_text())["ledger"]
    del progress["seconds"], progress["window"]["seconds"]
    return pairs, progress


@pytest.mark.slow
def test_a_run_resumed_at_any_step_ends_the_same_to_the_bit(tmp_path, capsys, monkeypatch):
    # What takes a moment in each of thirty runs and changes nothing: plots, and most compilations.
    monkeypatch.setattr("jax_lora.cli.train._write_plot", lambda run: None)
    compile_step, compiled = StepCache._compile, []

    def compile_if_none_is_left(*arguments):
        compiled[:] = compiled or [compile_step(*arguments)]
        return compiled[0]

    monkeypatch.setattr(StepCache, "_compile", compile_if_none_is_left)
    folder, model = write_tokenizer(tmp_path / "model"), Llama(ONE_LAYER)
    save(folder, model, random_params(model))
    lines = (
        json.dumps({"prompt": f"how many {'rows ' * (n % 5)}{n}?", "completion": f" count {n}"})
        for n in range(40)
    )
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    words = ["train", str(folder), "--data", str(tmp_path / "train.jsonl"), "--rank", "2"]
    words += ["--targets", "q_proj", "--val-batches", "0"]
    words += ["--iters", str(STEPS), "--save-every", "1", "--keep", "99", "--progress", "plain"]
    words += ["--batch-size", "1", "--grad-accumulation-steps", "2", "--pack", "--dropout", "0.1"]
    words += ["--max-seq-length", "64", "--adapter-path", str(run)]
    assert main(words) == 0
    epochs = capsys.readouterr().out
    expected = final(run)
    assert expected[1]["step"] == STEPS, epochs
    for step in range(1, STEPS):
        if step % 5 == 1:
            compiled.clear()
        part = shutil.copytree(run, tmp_path / f"from-{step}")
        words = ["--resume", str(part / f"step-{step:06d}"), "--save-every", str(STEPS)]
        assert main(["train", *words, "--progress", "none"]) == 0
        assert final(part) == expected, step
        shutil.rmtree(part)
