"""Report a run as JSON lines, one object per event."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO

from jax_lora.report.events import Reporter, RunPlan, RunResult, TrainReport, Validation
from jax_lora.report.metrics import finite


class JsonReporter(Reporter):
    """Write every event except single steps as one line of JSON.

    Args:
      out: The stream to write to.
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
        """Write the compile time and the memory of the step."""
        values = {"number": number, "seconds": seconds, "planned_memory_gb": gigabytes}
        self._write("compiled", values)

    def trained(self, report: TrainReport) -> None:
        """Write the report."""
        self._write("trained", dataclasses.asdict(report))

    def validated(self, validation: Validation) -> None:
        """Write the validation."""
        self._write("validated", dataclasses.asdict(validation))

    def saved(self, step: int, path: Path) -> None:
        """Write the path of the checkpoint."""
        self._write("saved", {"step": step, "path": str(path)})

    def finished(self, result: RunResult) -> None:
        """Write the summary."""
        checkpoint = None if result.checkpoint is None else str(result.checkpoint)
        self._write("finished", dataclasses.asdict(result) | {"checkpoint": checkpoint})

    def _write(self, event: str, values: dict[str, Any]) -> None:
        print(json.dumps({"event": event, **finite(values)}), file=self._out, flush=True)
