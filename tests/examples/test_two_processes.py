"""The example of two processes: both see the same numbers, those of one process, and save once."""

import re

import numpy as np
import pytest

import jax_lora as jl
from jax_lora.bundled import model_path

pytestmark = pytest.mark.slow


def losses(text):
    return re.findall(r"loss (\S+) -> (\S+)", text)


def test_two_processes_train_what_one_does(script, tmp_path, capsys):
    script.main(["--steps", "3", "--out", str(tmp_path / "two")])
    said = capsys.readouterr().out
    assert "process 0 of 2: 2 of 4 devices" in said and "process 1 of 2: 2 of 4 devices" in said
    assert "one adapter, saved once: 0.70 MB" in said
    two, same = losses(said)
    assert two == same
    first, last = map(float, two)
    assert last < first - 0.1
    (one,) = script.run(1, steps=3, out=tmp_path / "one", timeout=300)
    np.testing.assert_allclose([float(x) for x in losses(one)[0]], [first, last], rtol=1e-5)

    base = {"params": jl.models.load(model_path(), dtype="float32")[1]}
    saved = [jl.load_adapter(tmp_path / name, base=base) for name in ("one", "two")]
    for path, pair in saved[0].pairs.items():
        np.testing.assert_allclose(pair.b, saved[1].pairs[path].b, atol=2e-4, err_msg=path)
    assert len(list((tmp_path / "two").glob("arrays-*"))) == 1


def test_what_cannot_be_saved_ends_both_with_the_reason(script, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SystemExit, match=r"process \d died(.|\n)*a file of that name"):
        script.run(2, steps=1, out=tmp_path / "taken", timeout=300)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_run_without_end_is_ended(script, tmp_path):
    with pytest.raises(SystemExit, match="not done after 1 s; --timeout"):
        script.run(2, steps=10**6, out=tmp_path / "out", timeout=1)
