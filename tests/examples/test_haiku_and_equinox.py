"""The example haiku_and_equinox.py."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("make", ["haiku_model", "equinox_model"])
def test_an_adapter_learns_the_rotated_data(script, make):
    outcome = script.fine_tune(getattr(script, make)(), steps=150, rank=4, pretraining=150)
    assert outcome.before < 0.6 and outcome.after > 0.9
    assert outcome.distance < 1e-4  # scores are of size 20: float rounding
    assert outcome.base_unchanged


@pytest.mark.slow
def test_the_axes_of_each_library_are_printed(script, capsys):
    script.main(["--steps", "1", "--pretraining", "1"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = {words[0]: words[1] for words in lines if len(words) == 2}
    assert shown["mlp/~/linear_1/w"] == "(64, 64)  dense, in (0,), out (1,)"
    assert shown["layers/1/weight"] == "(64, 64)  dense, in (1,), out (0,)"
    for head in ("mlp/~/linear_2/w", "layers/2/weight"):
        assert shown[head].endswith("; the output head, not adapted")


def test_classes_are_rotated(script):
    xy, classes = script.points(0, 0)
    assert (classes == (xy[:, 0] * xy[:, 1] > 0)).all()
    xy, classes = script.points(0, 45)
    x, y = abs(xy[:, 0]), abs(xy[:, 1])
    assert (classes == (x > y)).all() or (classes == (x < y)).all()
