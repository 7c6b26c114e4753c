import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from jax_lora.errors import ConfigError
from jax_lora.report.events import Reporter, RunPlan, RunResult, TrainReport, Validation
from jax_lora.report.json_reporter import JsonReporter
from jax_lora.report.plain_reporter import PlainReporter
from jax_lora.report.reporters import make_reporter
from jax_lora.report.rich_reporter import RichReporter, duration, fitting_columns

PLAN = RunPlan(
    "bundled, 4,000,000 parameters", "rank 8", "2000 train", 20, ("a note [x]",), ("rows: --pack",)
)
REPORT = TrainReport(10, 2.164, 2e-5, 2.01, 4120.0, 20500, 3.7)
SAMPLES = (("say \x1b[31mred", "red [bold]"),)
VALIDATION = Validation(10, 1.5, 0.25, best=True, samples=SAMPLES)
RESULT = RunResult(
    steps=20,
    raw_tokens=40000,
    tokens=41000,
    padded_tokens=50000,
    seconds=12.5,
    compile_seconds=2.5,
    programs=3,
    val_loss=0.25,
    best=(0.25, "step-000020"),
    checkpoint=Path("run/x"),
    peak_memory=3.7,
    planned_memory=3.5,
)


def tell(reporter):
    reporter.planned(PLAN)
    reporter.compiling("rows of up to 64 tokens", 1)
    reporter.compiled(1, 2.5, 0.75)
    reporter.stepped(1, 2.5)
    reporter.trained(REPORT)
    reporter.validated(VALIDATION)
    reporter.saved(10, Path("run/[red]step-000010"))
    reporter.finished(RESULT)


def on_screen(width):
    out = io.StringIO()
    tell(RichReporter(Console(file=out, force_terminal=True, width=width, color_system=None)))
    shown = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", out.getvalue())
    # What the bar writes over is no line of the screen.
    return [line.rpartition("\r")[2] for line in shown.splitlines()]


def test_plain_lines_have_the_format_of_mlx_lm():
    out = io.StringIO()
    tell(PlainReporter(out))
    lines = out.getvalue().splitlines()
    assert (
        "Iter 10: Train loss 2.164, Learning Rate 2.000e-05, It/sec 2.010, Tokens/sec 4120.000, "
        "Trained Tokens 20500, Peak mem 3.700 GB" in lines
    )
    assert "Iter 10: Val loss 1.500, Val took 0.250s" in lines
    assert "Iter 10: Saved adapter weights to run/[red]step-000010." in lines
    assert r"Iter 10: Sample 'say \x1b[31mred' -> 'red [bold]'" in lines
    assert "Hint: rows: --pack" in lines
    assert "Compiled function 1 in 2.5s; the step needs 0.750 GB" in lines
    assert "\x1b" not in out.getvalue()


def test_the_summary_counts_tokens_and_compile_time():
    out = io.StringIO()
    PlainReporter(out).finished(RESULT)
    shown = out.getvalue()
    assert "Tokens: 40,000 in the text, 41,000 with the template, 50,000 with padding" in shown
    assert "Time: 12.5 s, of which 2.5 s compiling 3 functions" in shown
    assert "Speed: 4,100 tokens/s" in shown
    assert "Peak memory: 3.70 GB (planned for the step: 3.50 GB)" in shown


def test_json_has_one_object_per_event():
    out = io.StringIO()
    tell(JsonReporter(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        "planned",
        "compiling",
        "compiled",
        "trained",
        "validated",
        "saved",
        "finished",
    ]
    assert events[3]["loss"] == 2.164 and events[-1]["checkpoint"] == "run/x"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_terminal(width):
    lines = on_screen(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for expected in (
        "jax-lora train",
        "a note [x]",
        "2.1640",
        "1.5000",
        "done",
        "[red]step-000010",
    ):
        assert expected in text


def test_control_characters_are_escaped():
    assert r"say \x1b[31mred" in "\n".join(on_screen(100))


def test_a_narrow_terminal_drops_the_last_columns():
    heads = lambda width: [column.head for column in fitting_columns(width)]  # noqa: E731
    assert heads(80)[-1] == "eta" and heads(40) == ["iter", "loss", "val", "lr"]
    assert heads(10) == ["iter", "loss", "val"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h"), (1e12, "?")],
)
def test_a_duration_fits_its_column(seconds, text):
    assert duration(seconds) == text


def test_output_that_is_not_a_terminal_is_plain(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(make_reporter("auto"), PlainReporter)
    assert isinstance(make_reporter("json"), JsonReporter)
    assert type(make_reporter("none")) is Reporter


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="one of auto, rich, plain, json, none"):
        make_reporter("loud")


def test_none_prints_nothing(capsys):
    tell(make_reporter("none"))
    assert capsys.readouterr() == ("", "")
