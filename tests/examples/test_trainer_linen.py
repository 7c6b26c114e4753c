"""The example with a Linen model: the adapter learns, and the run resumes."""

import argparse

import pytest


@pytest.mark.slow
def test_it_learns_and_resumes(script, tmp_path, capsys):
    options = {"run": str(tmp_path / "run"), "resume": True}
    before, after = script.run(argparse.Namespace(steps=60, **options))
    assert after < before / 2
    again, _ = script.run(argparse.Namespace(steps=70, **options))
    assert again == after
    assert "Trained Targets 2240" in capsys.readouterr().out  # 70 steps of 32


def test_a_batch_depends_on_its_step_alone(script):
    one, same, other = (script.make_batch(step, turned=True) for step in (3, 3, 4))
    assert (one["images"] == same["images"]).all() and (one["labels"] == same["labels"]).all()
    assert (one["images"] != other["images"]).any()
