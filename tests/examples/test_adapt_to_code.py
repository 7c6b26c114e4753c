"""The example adapt_to_code.py."""

import contextlib
import io
import math
import re
import shutil

import jax
import numpy as np
import pytest
import yaml

import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.cli import main
from jax_lora.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Forty small files in the style of one author."""
    folder = tmp_path_factory.mktemp("code")
    for number in range(40):
        text = f"def zorp_{number}(quux):\n    return quux.zorp(blarg={number}).frob()\n"
        (folder / f"zorp_{number}.py").write_text(text * 2)
    (folder / "picture.bin").write_bytes(b"\0\1\2")
    return folder


def names(part):
    return {row.fields["file"] for row in part.rows}


def test_a_file_is_either_training_or_held_out(script, code):
    training, held_out = map(names, script.split(code))
    assert training | held_out == {f"zorp_{number}.py" for number in range(40)}
    assert not training & held_out and 1 <= len(held_out) <= 8


def test_the_split_of_a_file_does_not_depend_on_other_files(script, code, tmp_path):
    held_out = names(script.split(code)[1])
    fewer = shutil.copytree(code, tmp_path / "fewer")
    (fewer / "a_new_one.py").write_text("x = 1\n")
    for number in range(0, 39, 3):
        (fewer / f"zorp_{number}.py").write_text("rewritten = True\n")
        (fewer / f"zorp_{number + 1}.py").unlink()
    left = {file.name for file in fewer.glob("zorp_*")}
    assert names(script.split(fewer)[1]) - {"a_new_one.py"} == held_out & left != set()


def test_the_sample_has_a_limited_size(script, code, monkeypatch):
    _, held_out = script.split(code)
    sizes = [(code / row.fields["file"]).stat().st_size for row in held_out.rows]
    assert script.sample_of(held_out)[1] == sum(sizes)
    for most in (0, sizes[0]):  # one file at least
        monkeypatch.setattr(script, "EVALUATED", most)
        sample, size = script.sample_of(held_out)
        assert len(sample.rows) == 1 and size == sizes[0]
    monkeypatch.setattr(script, "EVALUATED", sum(sizes) - 1)
    assert len(script.sample_of(held_out)[0].rows) == len(sizes) - 1


@pytest.fixture(scope="module")
def adapted(script, code, tmp_path_factory):
    """The folder of a short run, its scores before and after, and what it prints."""
    out, scores, run = tmp_path_factory.mktemp("run") / "adapted", [], script.run
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(script, "run", lambda *given: scores.extend(run(*given)))
        script.main([str(code), "--steps", "8", "--rank", "4", "--out", str(out)])
    return out, scores, printed.getvalue()


@pytest.mark.slow
def test_the_score_is_that_of_unpacked_files_and_improves(script, code, adapted):
    out, (before, after), _ = adapted
    assert after.perplexity < before.perplexity / 2
    model, params = jl.models.load(model_path(), dtype="float32")
    adapter = jl.load_adapter(out / "step-000008", base={"params": params})
    for weights, score in (
        ({"params": params}, before),
        (jl.merge({"params": params}, adapter), after),
    ):
        nats, tokens, size = by_file(model, weights, script.split(code)[1])
        np.testing.assert_allclose(score.perplexity, math.exp(nats / tokens), rtol=1e-4)
        np.testing.assert_allclose(score.bits_per_byte, nats / math.log(2) / size, rtol=1e-4)


def by_file(model, variables, held_out):
    """Sum the loss over single files, without packing."""
    tokenizer, apply = Tokenizer.load(model_path()), jax.jit(model.apply)
    nats, tokens, size = 0.0, 0, 0
    for row in held_out.rows:
        ids = np.asarray([*tokenizer.encode(row.fields["text"]), 0])  # with its end
        padded = np.pad(ids, (0, 128 - len(ids)))[
            None
        ]  # to the right, where nobody looks back from
        losses = np.float64(jax.nn.log_softmax(apply(variables, padded)[0]))
        nats -= losses[np.arange(len(ids) - 1), ids[1:]].sum()
        tokens, size = tokens + len(ids) - 1, size + len(row.fields["text"].encode())
    return nats, tokens, size


@pytest.mark.slow
def test_generate_finds_the_adapter_its_model_and_its_dtype(adapted, capsys):
    out, *_ = adapted
    answers = []
    asked = ["generate", "--prompt", "def zorp_3(quux):", "--max-tokens", "16"]
    for more in ([], ["--adapter-path", str(out)]):
        assert main([*asked, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert "quux.zorp" in answers[1] and "quux.zorp" not in answers[0]
    assert yaml.safe_load((out / "config.yaml").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_it_prints_its_results(adapted):
    out, scores, said = adapted
    assert "33 training files, 7 held out" in said and "7 of these are evaluated, 790 bytes" in said
    assert "93,696 of 4,389,632 parameters are trainable (2.1%)" in said
    printed = re.findall(r"perplexity +([\d.]+), ([\d.]+) bits", said)
    assert printed == [(f"{each.perplexity:.2f}", f"{each.bits_per_byte:.3f}") for each in scores]
    assert f"--adapter-path {out}" in said


@pytest.mark.parametrize("name", ["empty", "one", "missing"])
def test_a_folder_without_enough_files_is_a_message(script, tmp_path, name):
    for folder in ("empty", "one"):
        (tmp_path / folder).mkdir()
    (tmp_path / "one" / "a.py").write_text("x = 1\n")
    count = 1 if name == "one" else 0
    with pytest.raises(SystemExit, match=f"(?s){name}.*{count} training files and 0 held-out"):
        script.main([str(tmp_path / name)])
