"""The example nnx_model.py."""

import pytest


@pytest.mark.slow
def test_it_learns_and_updates_the_module(script, capsys):
    before, after, distance, base_unchanged = script.run(steps=80, rank=4, pretraining=80)
    assert after < before / 5
    assert distance < 1e-5  # rounding errors of forecasts up to 2
    assert base_unchanged
    shown = capsys.readouterr().out
    assert f"{before:.4f} before, {after:.4f} after" in shown
    assert "the updated module is bitwise equal to the new one: True" in shown
    assert "head/kernel" not in shown  # the output head is not adapted


def test_a_forecast_depends_on_the_past_only(script):
    model = script.nnx.jit(script.Forecaster)(script.nnx.Rngs(0))
    series = script.sines(0)
    call = script.nnx.jit(lambda model, series: model(series))
    forecasts, changed = call(model, series), call(model, series.at[:, 20:].set(5.0))
    assert (forecasts[:, :20] == changed[:, :20]).all()
    assert (forecasts[:, 20:] != changed[:, 20:]).all()


def test_batches_depend_on_their_number_only(script):
    series = script.climbing(3)
    assert series.shape == (script.BATCH_SIZE, script.TIME)
    assert (series == script.climbing(3)).all() and (series != script.climbing(4)).any()
    assert 1.5 < float((series[:, -1] - series[:, 0]).mean()) < 2.5
