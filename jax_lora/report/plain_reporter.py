"""The run as lines, one a report, for pipes, files and batch systems."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from jax_lora.report.events import Reporter, RunPlan, RunResult, TrainReport, Validation
from jax_lora.report.printable import printable
from jax_lora.report.run_summary import summary_lines


class PlainReporter(Reporter):
    """Writes a line a report, as log parsers know them.

    Args:
      out: Where the lines go.
    """

    def __init__(self, out: TextIO):
        """Write to `out`."""
        self._out = out

    def planned(self, plan: RunPlan) -> None:
        """Name the model, the adapter and the data."""
        self._line(f"Model: {plan.model}")
        self._line(f"LoRA: {plan.adapter}")
        self._line(f"Data: {plan.data}")
        for note in plan.notes:
            self._line(f"Note: {note}")
        for hint in plan.hints:
            self._line(f"Hint: {hint}")
        self._line(f"Starting training..., iters: {plan.steps}")

    def compiling(self, what: str, number: int) -> None:
        """Say why nothing happens for a while."""
        self._line(f"Compiling program {number}: {what}")

    def compiled(self, number: int, seconds: float, gigabytes: float) -> None:
        """Say what it took, and what the step will."""
        needs = f"; the step needs {gigabytes:.3f} GB" if gigabytes else ""
        self._line(f"Compiled program {number} in {seconds:.1f}s{needs}")

    def trained(self, report: TrainReport) -> None:
        """Write the report's line."""
        self._line(
            f"Iter {report.step}: Train loss {report.loss:.3f}, "
            f"Learning Rate {report.learning_rate:.3e}, "
            f"It/sec {report.steps_per_second:.3f}, "
            f"Tokens/sec {report.tokens_per_second:.3f}, "
            f"Trained Tokens {report.tokens}, "
            f"Peak mem {report.peak_memory:.3f} GB"
        )

    def validated(self, validation: Validation) -> None:
        """Write the validation loss, and the answers."""
        step = validation.step
        self._line(
            f"Iter {step}: Val loss {validation.loss:.3f}, Val took {validation.seconds:.3f}s"
        )
        for prompt, answer in validation.samples:
            self._line(f"Iter {step}: Sample {prompt!r} -> {answer!r}")

    def saved(self, step: int, path: Path) -> None:
        """Name the checkpoint."""
        self._line(f"Iter {step}: Saved adapter weights to {path}.")

    def finished(self, result: RunResult) -> None:
        """Write the summary."""
        for name, value in summary_lines(result):
            self._line(f"{name}: {value}")

    def _line(self, text: str) -> None:
        print(printable(text, keep=""), file=self._out, flush=True)
