"""Show the progress of a task: a bar on a terminal, or one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from jax_lora.printable import printable
from jax_lora.report.screen import unscreened

Advance = Callable[[int, int], None]


@contextlib.contextmanager
def progress_bar(what: str, kind: str = "auto") -> Iterator[Advance]:
    """Show the progress of a block on standard error, because standard output may be JSON.

    Args:
      what: The task, such as `"Loading model"`.
      kind: One of `jax_lora.report.reporters.KINDS`: `"auto"` shows a bar on a terminal and nothing
        elsewhere, where standard error is for errors; `"plain"` shows a line.

    Yields:
      A function of the work done and of all work, in any unit.

    Example:
      >>> with progress_bar("Counting", "none") as advance:
      ...     advance(1, 2)
    """
    if kind == "rich" or (kind == "auto" and sys.stderr.isatty()):
        yield from _bar(what, force=kind == "rich")
        return
    if kind == "plain":
        print(printable(what, keep=""), file=sys.stderr)
    yield lambda done, total: None


def _bar(what: str, *, force: bool) -> Iterator[Advance]:
    """Show a bar that disappears at the end."""
    from rich import progress
    from rich.console import Console

    console = Console(file=unscreened(sys.stderr), force_terminal=True if force else None)
    room = console.width // 2
    shown = printable(what, keep="")
    shown = shown if len(shown) <= room else f"{shown[: room - 1]}…"
    with progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # they are screened
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(shown, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
