"""The script pretrain_tiny.py."""

import random
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_lora.bundled import model_path

pytest.importorskip("tokenizers")
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda omega sigma upsilon"


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model_path() / "tokenizer.json"))


@pytest.mark.parametrize("seed", range(5))
def test_reordered_names_are_in_the_list(script, seed):
    (listing, weight), *later = script._reordered(random.Random(seed), WORDS, 100)
    assert weight == 0
    for piece, counts in later:
        assert counts == 1
        assert set(piece.replace(",", " ").split()) <= set(listing.replace(",", " ").split())


@pytest.mark.parametrize("seed", range(5))
def test_paired_values_count_from_their_second_occurrence(script, seed):
    pieces = script._paired(random.Random(seed), WORDS, 100)
    seen = {}
    for (key, key_counts), (value, value_counts) in zip(pieces[::2], pieces[1::2], strict=True):
        assert key_counts == 0
        assert value_counts == int(key in seen)
        assert seen.setdefault(key, value) == value


def test_batches_depend_on_the_step_only(script, tokenizer):
    texts = [(WORDS + "\n") * 40, WORDS.upper() * 30]
    first, again = (script.Rows(tokenizer, texts, 65) for _ in range(2))
    first.batch(0, 4)
    for one, other in zip(first.batch(3, 4), again.batch(3, 4), strict=True):
        assert one.shape == (4, 65)
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first.batch(3, 4)[0], first.batch(2, 4)[0])


def test_text_rows_contain_every_token_and_share_one(script, tokenizer):
    rows = script.text_rows(tokenizer, [WORDS * 20], 33)
    whole = [0, *tokenizer.encode(WORDS * 20).ids]
    assert len(rows) == (len(whole) - 1) // 32
    np.testing.assert_array_equal(rows[:, :-1].ravel(), whole[: rows[:, :-1].size])
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])


def test_tables_are_excluded(script):
    assert script._is_table("0x1f, 0x20, 0x21, " * 20)
    assert not script._is_table(WORDS)


def test_few_documents_are_held_out_by_name(script):
    kept = [name for name in (f"module{i}.py" for i in range(5000)) if script.held_out(name)]
    assert 60 < len(kept) < 140


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_same(script, tmp_path, monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    monkeypatch.setattr(
        script, "CONFIG", type(script.CONFIG)(**{**script.CONFIG.__dict__, **small})
    )
    monkeypatch.setattr(script, "TOKENS_PER_STEP", 2 * 512)
    monkeypatch.setattr(script, "evaluate", lambda *arguments: (0.0, 0.0))  # it changes nothing
    kept = next(f"{i}" for i in range(1000) if script.held_out(f"{i}"))
    source = Path(random.__file__).read_text(encoding="utf-8")
    monkeypatch.setattr(script, "documents", lambda: {"random": source, kept: source})

    def run(folder: str, *options: str) -> bytes:
        arguments = ["--out", str(tmp_path / folder), "--steps", "4", "--snapshot-every", "2"]
        monkeypatch.setattr(sys, "argv", ["pretrain_tiny.py", *arguments, *options])
        # Optax's own bias correction mixes integers and floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            script.main()
        return (tmp_path / folder / "model.safetensors").read_bytes()

    straight = run("straight")
    save_state = script.save_state

    def stop_after_saving(*arguments):
        save_state(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_state", stop_after_saving)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(script, "save_state", save_state)
    assert run("stopped", "--resume") == straight
