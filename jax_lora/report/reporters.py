"""Choose a reporter by name."""

from __future__ import annotations

import sys

from jax_lora.errors import ConfigError
from jax_lora.report.events import Reporter
from jax_lora.report.json_reporter import JsonReporter
from jax_lora.report.plain_reporter import PlainReporter
from jax_lora.report.screen import unscreened

KINDS = ("auto", "rich", "plain", "json", "none")


def make_reporter(kind: str = "auto") -> Reporter:
    """Create the reporter of a run.

    Args:
      kind: `"rich"`, `"plain"`, `"json"`, `"none"`, or `"auto"` for rich on a terminal and plain
        otherwise.

    Raises:
      ConfigError: The kind is unknown.
    """
    if kind not in KINDS:
        raise ConfigError(
            "progress",
            got=repr(kind),
            expected=f"one of {', '.join(KINDS)}",
            fix="Omit it to choose rich on a terminal and plain otherwise.",
        )
    if kind == "none":
        return Reporter()
    if kind == "json":
        return JsonReporter(sys.stdout)
    if kind == "rich" or (kind == "auto" and sys.stdout.isatty()):
        from rich.console import Console

        from jax_lora.report.rich_reporter import RichReporter

        return RichReporter(
            Console(file=unscreened(sys.stdout), force_terminal=True if kind == "rich" else None)
        )
    return PlainReporter(sys.stdout)
