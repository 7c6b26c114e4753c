"""The example vision_transformer.py."""

import jax
import pytest


@pytest.mark.slow
def test_lora_learns_more_than_the_head_alone(script, capsys):
    before, head_alone, after = script.run(steps=80, rank=4, pretraining=80, layers=1)
    assert before < 0.3  # eight classes and a random head
    assert after > 0.7 and after > head_alone + 0.25
    shown = capsys.readouterr().out
    assert "params/head/kernel                     (32, 8)     whole" in shown
    # 4 * 4 * (32 + 32) for attention, 2 * 4 * (32 + 64) for the MLP, 33 * 8 for the head.
    assert "trainable 2,056 of" in shown
    assert f"accuracy with LoRA and the head:       {after:.3f}" in shown


@pytest.mark.parametrize("dark", [False, True])
def test_bars_have_the_direction_of_their_class(script, dark):
    pictures, classes = script.bars(0, classes=4, dark=dark, size=200)
    assert pictures.shape == (200, script.SIDE, script.SIDE, 1)
    ink = 1 - pictures[..., 0] if dark else pictures[..., 0]  # (rows, side, side)
    ink = jax.numpy.where(ink > 0.7, 1.0, 0.0)  # above the noise
    wide, high = ink.any(axis=1).sum(axis=1), ink.any(axis=2).sum(axis=1)  # (rows,) each
    assert (wide - high)[classes == 0].mean() > 8  # along x
    assert (high - wide)[classes == 2].mean() > 8  # along y
    for diagonal in (1, 3):
        assert abs((wide - high)[classes == diagonal].mean()) < 2


def test_all_directions_are_drawn(script):
    _, classes = script.bars(0, classes=8, dark=True, size=400)
    assert set(classes.tolist()) == set(range(8))
