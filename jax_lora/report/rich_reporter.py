"""Report a run on a terminal: a panel, a growing table, a progress bar and a summary."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jax_lora.printable import printable
from jax_lora.report.events import Reporter, RunPlan, RunResult, TrainReport, Validation
from jax_lora.report.run_summary import summary_lines
from jax_lora.report.screen import screen_again


class Column(NamedTuple):
    """A column of the table: heading, width, and whether it is kept on a narrow terminal."""

    head: str
    width: int
    needed: bool = False


COLUMNS = (
    Column("iter", 6, True),
    Column("loss", 8, True),
    Column("val", 8, True),
    Column("lr", 8),
    Column("tokens/s", 9),
    Column("it/s", 6),
    Column("memory", 8),
    Column("tokens", 11),
    Column("eta", 7),
)


class RichReporter(Reporter):
    """Show a run on a terminal.

    Args:
      console: The terminal.
    """

    def __init__(self, console: Console):
        """Create the progress bar, which appears with the first event."""
        self._console = console
        self._steps = 0
        self._columns = fitting_columns(console.width)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=None, loss="-")

    def planned(self, plan: RunPlan) -> None:
        """Show the panel and the table headings."""
        self._steps = plan.steps
        lines = [("model", plan.model, ""), ("LoRA", plan.adapter, ""), ("data", plan.data, "")]
        lines += [("note", note, "yellow") for note in plan.notes]
        lines += [("hint", hint, "cyan") for hint in plan.hints]
        self._panel("jax-lora train", lines)
        self._row({column.head: column.head for column in COLUMNS}, "bold")
        self._progress.update(self._task, total=plan.steps)
        before = sys.stdout, sys.stderr
        self._progress.start()  # it replaces the two streams, without their screening
        screen_again(before)

    def compiling(self, what: str, number: int) -> None:
        """Show which step is being compiled, because this takes a while."""
        self._progress.update(self._task, description=printable(f"compiling for {what}", keep=""))

    def compiled(self, number: int, seconds: float, gigabytes: float) -> None:
        """Write the compile time and the memory of the step."""
        what = self._progress.tasks[0].description.removeprefix("compiling for ")
        needs = f", planned {gigabytes:.2f} GB" if gigabytes else ""
        self._say(
            self._one_line(f"compiled function {number}: {what}, {seconds:.1f} s{needs}"), "dim"
        )

    def stepped(self, step: int, loss: float) -> None:
        """Advance the progress bar."""
        shown = f"{loss:.3f}"
        self._progress.update(self._task, description="training", completed=step, loss=shown)

    def trained(self, report: TrainReport) -> None:
        """Write a row of metrics above the progress bar."""
        left = (self._steps - report.step) / max(report.steps_per_second, 1e-9)
        self._row(
            {
                "iter": f"{report.step}",
                "loss": f"{report.loss:.4f}",
                "lr": "" if report.learning_rate is None else f"{report.learning_rate:.1e}",
                "tokens/s": f"{report.tokens_per_second:,.0f}",
                "it/s": f"{report.steps_per_second:.2f}",
                "memory": f"{report.peak_memory:.2f} GB",
                "tokens": f"{report.tokens:,}",
                "eta": duration(left),
            }
        )

    def validated(self, validation: Validation) -> None:
        """Write a row with the validation loss, and the sampled responses below it."""
        row = {"iter": f"{validation.step}", "val": f"{validation.loss:.4f}"}
        self._row(row, "bold green" if validation.best else "green")
        for prompt, answer in validation.samples:
            self._say(self._one_line(f"  {prompt.strip()}"), "dim")
            self._say(self._one_line(f"  {answer.strip()}"), "cyan")

    def saved(self, step: int, path: Path) -> None:
        """Write the path of the checkpoint above the progress bar."""
        self._say(f"{step:>6} saved {path}", "dim")

    def finished(self, result: RunResult) -> None:
        """Remove the progress bar and show the summary."""
        self._progress.stop()
        title = "interrupted" if result.interrupted else "done"
        lines = summary_lines(result)
        self._panel(title, [(name.lower(), value, "") for name, value in lines])

    def _one_line(self, text: str) -> str:
        line = text.replace("\n", " ⏎ ")
        return line if len(line) <= self._console.width else line[: self._console.width - 1] + "…"

    def _panel(self, title: str, lines: list[tuple[str, str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value, style in lines:
            table.add_row(Text(name, style=f"bold {style}"), Text(printable(value)))
        self._console.print(Panel(table, title=title, title_align="left", box=box.ROUNDED))

    def _row(self, values: dict[str, str], style: str = "") -> None:
        cells = [values.get(column.head, "").rjust(column.width) for column in self._columns]
        self._say(" ".join(cells).rstrip(), style)

    def _say(self, text: str, style: str = "") -> None:
        # Rich would parse brackets in a string, such as those of a file name, as markup.
        self._console.print(Text(printable(text), style=style), soft_wrap=True)


def fitting_columns(width: int) -> tuple[Column, ...]:
    """Choose the columns that fit a terminal of this width; others are dropped from the right."""
    columns = list(COLUMNS)
    while sum(column.width + 1 for column in columns) > width:
        extra = [column for column in columns if not column.needed]
        if not extra:
            break
        columns.remove(extra[-1])
    return tuple(columns)


def duration(seconds: float) -> str:
    """Format seconds in at most seven characters: "42s", "3m20s", "2h05m", "3d04h", or "?"."""
    if not math.isfinite(seconds) or seconds > 100 * 86400:
        return "?"
    seconds = round(seconds)
    for unit, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // smaller:02d}{below}"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
