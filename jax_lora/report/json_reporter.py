"""The run as JSON, an object an event, for programs that watch it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TextIO

from jax_lora.report.events import Reporter, RunPlan, RunResult, TrainReport, Validation


class JsonReporter(Reporter):
    """Writes every event but the single steps as one JSON object on a line of its own.

    Args:
      out: Where the lines go.
    """

    def __init__(self, out: TextIO):
        """Write to `out`."""
        self._out = out

    def planned(self, plan: RunPlan) -> None:
        """Write the plan."""
        self._write("planned", dataclasses.asdict(plan))

    def compiling(self, what: str, number: int) -> None:
        """Write what is being compiled."""
        self._write("compiling", {"what": what, "number": number})

    def compiled(self, number: int, seconds: float, gigabytes: float) -> None:
        """Write what it took."""
        values = {"number": number, "seconds": seconds, "planned_memory_gb": gigabytes}
        self._write("compiled", values)

    def trained(self, report: TrainReport) -> None:
        """Write the report."""
        self._write("trained", dataclasses.asdict(report))

    def validated(self, validation: Validation) -> None:
        """Write the validation."""
        self._write("validated", dataclasses.asdict(validation))

    def saved(self, step: int, path: Path) -> None:
        """Write where the checkpoint is."""
        self._write("saved", {"step": step, "path": str(path)})

    def finished(self, result: RunResult) -> None:
        """Write the summary."""
        self._write("finished", dataclasses.asdict(result) | {"checkpoint": str(result.checkpoint)})

    def _write(self, event: str, values: dict[str, Any]) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        print(json.dumps({"event": event, **plain}), file=self._out, flush=True)


def _plain(value: Any) -> Any:
    """JSON has no word for what is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
