"""The run on a terminal: a panel, a line a report, a progress bar, a box at the end."""

from __future__ import annotations

import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jax_lora.errors import ConfigError, explain
from jax_lora.report.progress import (
    PlainReporter,
    Reporter,
    RunPlan,
    RunResult,
    SilentReporter,
    TrainReport,
    summary_lines,
)

KINDS = ("auto", "rich", "plain", "none")


class RichReporter:
    """Shows the run on a terminal.

    Args:
      console: The terminal.
    """

    def __init__(self, console: Console):
        """Set the bar up; it appears with the first event."""
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=None, loss="-")

    def planned(self, plan: RunPlan) -> None:
        """Show the panel."""
        table = Table.grid(padding=(0, 2))
        for name, value in (("model", plan.model), ("LoRA", plan.adapter), ("data", plan.data)):
            table.add_row(Text(name, style="bold"), Text(value))
        for note in plan.notes:
            table.add_row(Text("note", style="bold yellow"), Text(note))
        self._console.print(Panel(table, title="jax-lora train", box=box.ROUNDED))
        self._progress.update(self._task, total=plan.steps)
        self._progress.start()

    def compiling(self, what: str, number: int) -> None:
        """Say why nothing moves for a while."""
        self._progress.update(self._task, description="compiling")
        self._say(f"compiling program {number}: {what}", "dim")

    def stepped(self, step: int, loss: float) -> None:
        """Move the bar."""
        shown = f"{loss:.3f}"
        self._progress.update(self._task, description="training", completed=step, loss=shown)

    def trained(self, report: TrainReport) -> None:
        """Write a line above the bar."""
        self._say(
            f"iter {report.step:>5}  loss {report.loss:7.4f}  lr {report.learning_rate:.2e}  "
            f"{report.tokens_per_second:7,.0f} tokens/s  {report.steps_per_second:5.2f} it/s  "
            f"{report.peak_memory:.2f} GB  {report.tokens:,} tokens"
        )

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """Write the validation loss above the bar."""
        self._say(f"iter {step:>5}  validation loss {loss:.4f}  ({seconds:.1f} s)", "bold green")

    def saved(self, step: int, path: Path) -> None:
        """Name the checkpoint above the bar."""
        self._say(f"iter {step:>5}  saved {path}", "dim")

    def finished(self, result: RunResult) -> None:
        """Take the bar away and show the box."""
        self._progress.stop()
        table = Table.grid(padding=(0, 2))
        for name, value in summary_lines(result):
            table.add_row(Text(name, style="bold"), Text(value))
        title = "interrupted" if result.interrupted else "done"
        self._console.print(Panel(table, title=title, box=box.ROUNDED))

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))


def make_reporter(kind: str = "auto") -> Reporter:
    """Choose how a run is shown.

    Args:
      kind: `"rich"`, `"plain"`, `"none"`, or `"auto"`: rich on a terminal and plain elsewhere.

    Returns:
      The reporter.

    Raises:
      ConfigError: Another kind.
    """
    if kind not in KINDS:
        raise ConfigError(
            explain(
                "--progress",
                got=repr(kind),
                expected=f"one of {', '.join(KINDS)}",
                fix="Leave it out to let the terminal decide.",
            )
        )
    if kind == "none":
        return SilentReporter()
    if kind == "rich" or (kind == "auto" and sys.stdout.isatty()):
        return RichReporter(Console(force_terminal=True if kind == "rich" else None))
    return PlainReporter(sys.stdout)
