"""A run on a quantized base model, from training to a merged folder."""

import json

import jax
import numpy as np
import pytest

from jax_lora.cli import main
from jax_lora.models import Llama, LlamaConfig, load, save
from tests.tiny_model import random_params, write_tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run: (its folder, the model's folder)."""
    here = tmp_path_factory.mktemp("quantized")
    model = Llama(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True))
    save(write_tokenizer(here / "model"), model, random_params(model))
    rows = [{"prompt": f"count {n}:", "completion": " rows"} for n in range(12)]
    (here / "data").mkdir()
    (here / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["train", str(here / "model"), "--data", str(here / "data"), "--quantize", "nf4"]
    words += ["--iters", "4", "--learning-rate", "0.02", "--progress", "none"]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*words, "--adapter-path", str(here / "run")]) == 0
    return here / "run", here / "model"


def test_a_run_remembers_how_its_base_is_stored(run, capsys):
    folder, _ = run
    assert "quantize: nf4" in (folder / "config.yaml").read_text()
    assert main(["train", "--resume", str(folder), "--iters", "5", "--progress", "none"]) == 0
    where = ["--adapter-path", str(folder), "--max-tokens", "4"]
    assert main(["generate", *where, "--prompt", "a"]) == 0
    capsys.readouterr()
    assert main(["eval", *where, "--split", "train", "--compare-base"]) == 0
    losses = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    base, adapter = map(float, losses.split()[2:4])
    assert adapter < base


def test_fuse_merges_into_the_original_weights(run, tmp_path, capsys):
    folder, model = run
    words = ["fuse", "--adapter-path", str(folder), "--save-path", str(tmp_path / "fused")]
    assert main([*words, "--check"]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    before, after = load(model)[1], load(tmp_path / "fused")[1]
    for name in ("q_proj", "o_proj"):
        w, merged = (np.asarray(p["layers"]["attn"][name]["kernel"]) for p in (before, after))
        update = merged - w
        # The update has the adapter's rank: nothing of the quantization error is in it.
        assert np.linalg.matrix_rank(update[0], tol=1e-4 * np.abs(update).max()) <= 16 + 1
        assert np.abs(update).max() > 0


def test_fuse_into_the_quantized_weights_says_what_is_kept(run, tmp_path, capsys):
    folder, _ = run
    words = ["fuse", "--adapter-path", str(folder), "--save-path", str(tmp_path / "fused")]
    assert main([*words, "--into", "quantized"]) == 0
    assert "of the gain is kept" in capsys.readouterr().out
    once = load(tmp_path / "fused", quantize="nf4")[1]
    again = load(tmp_path / "fused")[1]
    name = "q_proj"
    stored = once["layers"]["attn"][name]["kernel"].made()
    np.testing.assert_allclose(stored, again["layers"]["attn"][name]["kernel"], atol=2e-3)


def test_full_fine_tuning_of_a_quantized_base_is_refused(run, tmp_path, capsys):
    _, model = run
    words = ["train", str(model), "--fine-tune-type", "full", "--quantize", "nf4"]
    assert main([*words, "--adapter-path", str(tmp_path / "run")]) == 2
    assert "in full fine-tuning" in capsys.readouterr().err
