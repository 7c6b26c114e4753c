import json

import pytest

from jax_lora.cli import main
from jax_lora.report.curves import read_curves
from jax_lora.report.loss_plot import write_run_plot
from jax_lora.report.text_plot import text_plot


def make_run(folder, train, valid=()):
    folder.mkdir()
    rows = [{"iter": step, "train_loss": loss} for step, loss in train]
    rows += [{"iter": step, "val_loss": loss} for step, loss in valid]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path):
    train = [(step, 2.0 / step) for step in range(1, 41)] + [(41, None)]
    return make_run(tmp_path / "first", train, [(20, 0.5), (40, 0.25)])


def test_curves_omit_non_finite_losses(run):
    curves = read_curves(run)
    assert (curves.name, len(curves.train), curves.best) == ("first", 40, (40, 0.25))


def test_a_run_gets_its_plot(run):
    write_run_plot(run)
    content = (run / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_the_command_plots_several_runs(run, tmp_path, capsys):
    other = make_run(tmp_path / "second", [(1, 3.0)])
    target = tmp_path / "both.png"
    assert main(["plot", str(run), str(other), "-o", str(target), "--log-y"]) == 0
    assert capsys.readouterr().out.strip() == str(target) and target.is_file()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("width", [40, 80])
def test_the_text_plot_fits_the_terminal_and_names_the_best_loss(run, width, log):
    lines = text_plot([read_curves(run)], width, log=log)
    assert max(map(len, lines[:-1])) <= width
    assert "best 0.2500 at step 40" in lines[-1]
    assert sum(line.count("·") for line in lines[:-1]) > 10


def test_one_point_or_none_can_be_plotted(tmp_path):
    one = read_curves(make_run(tmp_path / "one", [(1, 3.0)]))
    assert any("·" in line for line in text_plot([one]))
    none = read_curves(make_run(tmp_path / "none", [(1, None)]))
    assert text_plot([none]) == ["no losses to plot"]


def test_the_command_plots_in_the_terminal(run, capsys):
    assert main(["plot", str(run), "--text"]) == 0
    assert "first, training" in capsys.readouterr().out


def test_another_image_format_is_refused(run, capsys):
    assert main(["plot", str(run), "-o", "loss.jpg"]) == 2
    assert "Use --save-path loss.png" in capsys.readouterr().err


def test_a_missing_run_is_one_message(capsys):
    assert main(["plot", "nowhere"]) == 2
    assert "nowhere\n  got:      no such file" in capsys.readouterr().err
