"""A run that is resumed at any of its steps ends as the run that was never stopped."""

import json
import shutil

import jax
import pytest

from jax_lora.cli import main
from jax_lora.models import Llama, save
from tests.tiny_model import TINY, random_params, write_tokenizer

STEPS = 30


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
def test_a_run_resumed_at_any_step_ends_the_same_to_the_bit(tmp_path, capsys):
    model = write_tokenizer(tmp_path / "model")
    save(model, Llama(TINY), random_params(Llama(TINY)))
    lines = (
        json.dumps({"prompt": f"how many {'rows ' * (n % 5)}{n}?", "completion": f" count {n}"})
        for n in range(40)
    )
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    words = ["train", str(model), "--data", str(tmp_path / "train.jsonl"), "--rank", "2"]
    words += ["--iters", str(STEPS), "--save-every", "1", "--keep", "99", "--progress", "plain"]
    words += ["--batch-size", "1", "--grad-accumulation-steps", "2", "--pack", "--dropout", "0.1"]
    words += ["--max-seq-length", "64", "--adapter-path", str(run)]
    assert main(words) == 0
    epochs = capsys.readouterr().out
    expected = final(run)
    assert expected[1]["step"] == STEPS, epochs
    for step in range(1, STEPS):
        part = shutil.copytree(run, tmp_path / f"from-{step}")
        words = ["--resume", str(part / f"step-{step:06d}"), "--save-every", str(STEPS)]
        assert main(["train", *words, "--progress", "none"]) == 0
        assert final(part) == expected, step
        shutil.rmtree(part)
