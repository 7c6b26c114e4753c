import io
from pathlib import Path

import pytest
from rich.console import Console

from jax_lora.errors import ConfigError
from jax_lora.report.progress import PlainReporter, RunPlan, RunResult, TrainReport
from jax_lora.report.screen import RichReporter, make_reporter

PLAN = RunPlan("bundled, 4,000,000 parameters", "rank 8", "2000 train", 20, ("a note [x]",))
REPORT = TrainReport(10, 2.164, 2e-5, 2.01, 4120.0, 20500, 3.7)
RESULT = RunResult(20, 41000, 50000, 12.5, 2.5, 0.25, (0.25, "step-000020"), Path("run/x"), 3.7)


def tell(reporter):
    reporter.planned(PLAN)
    reporter.compiling(64)
    reporter.stepped(1, 2.5)
    reporter.trained(REPORT)
    reporter.validated(10, 1.5, 0.25)
    reporter.saved(10, Path("run/step-000010"))
    reporter.finished(RESULT)


def test_a_report_is_the_line_that_log_parsers_know():
    out = io.StringIO()
    tell(PlainReporter(out))
    lines = out.getvalue().splitlines()
    assert (
        "Iter 10: Train loss 2.164, Learning Rate 2.000e-05, It/sec 2.010, Tokens/sec 4120.000, "
        "Trained Tokens 20500, Peak mem 3.700 GB" in lines
    )
    assert "Iter 10: Val loss 1.500, Val took 0.250s" in lines
    assert "Iter 10: Saved adapter weights to run/step-000010." in lines


def test_a_summary_tells_padding_and_compiling_apart():
    out = io.StringIO()
    PlainReporter(out).finished(RESULT)
    assert "Tokens: 41,000 (50,000 with padding)" in out.getvalue()
    assert "Time: 12.5 s, of which 2.5 s compiling" in out.getvalue()
    assert "Speed: 4,100 tokens/s" in out.getvalue()


def test_a_terminal_shows_the_same_events_and_the_notes_as_they_are():
    out = io.StringIO()
    tell(RichReporter(Console(file=out, force_terminal=True, width=100)))
    shown = out.getvalue()
    for text in ("jax-lora train", "a note [x]", "2.1640", "validation loss 1.5000", "done"):
        assert text in shown


def test_outside_a_terminal_lines_are_plain(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(make_reporter("auto"), PlainReporter)


def test_another_kind_is_refused():
    with pytest.raises(ConfigError, match="one of auto, rich, plain, none"):
        make_reporter("loud")


def test_none_says_nothing(capsys):
    tell(make_reporter("none"))
    assert capsys.readouterr() == ("", "")
