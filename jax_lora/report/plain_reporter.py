"""Report a run as plain lines, for pipes, log files and batch systems."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from jax_lora.printable import printable
from jax_lora.report.events import Reporter, RunPlan, RunResult, TrainReport, Validation
from jax_lora.report.run_summary import summary_lines


class PlainReporter(Reporter):
    """Write one line per event, in the format of mlx-lm, which log parsers support.

    Args:
      out: The stream to write to.
    """

    def __init__(self, out: TextIO):
        """Write to `out`."""
        self._out = out

    def planned(self, plan: RunPlan) -> None:
        """Write the model, the adapter and the data."""
        self._line(f"Model: {plan.model}")
        self._line(f"LoRA: {plan.adapter}")
        self._line(f"Data: {plan.data}")
        for note in plan.notes:
            self._line(f"Note: {note}")
        for hint in plan.hints:
            self._line(f"Hint: {hint}")
        self._line(f"Starting training..., iters: {plan.steps}")

    def compiling(self, what: str, number: int) -> None:
        """Write what is being compiled, as this takes a while."""
        self._line(f"Compiling function {number}: {what}")

    def compiled(self, number: int, seconds: float, gigabytes: float) -> None:
        """Write the compile time and the memory of the step."""
        needs = f"; the step needs {gigabytes:.3f} GB" if gigabytes else ""
        self._line(f"Compiled function {number} in {seconds:.1f}s{needs}")

    def trained(self, report: TrainReport) -> None:
        """Write the training metrics."""
        known = report.learning_rate is not None
        rate = f"Learning Rate {report.learning_rate:.3e}, " if known else ""
        self._line(
            f"Iter {report.step}: Train loss {report.loss:.3f}, "
            f"{rate}"
            f"It/sec {report.steps_per_second:.3f}, "
            f"{report.unit}/sec {report.tokens_per_second:.3f}, "
            f"Trained {report.unit} {report.tokens}, "
            f"Peak mem {report.peak_memory:.3f} GB"
        )

    def validated(self, validation: Validation) -> None:
        """Write the validation loss and the sampled responses."""
        step = validation.step
        self._line(
            f"Iter {step}: Val loss {validation.loss:.3f}, Val took {validation.seconds:.3f}s"
        )
        for prompt, answer in validation.samples:
            self._line(f"Iter {step}: Sample {prompt!r} -> {answer!r}")

    def saved(self, step: int, path: Path) -> None:
        """Write the path of the checkpoint."""
        self._line(f"Iter {step}: Saved adapter weights to {path}.")

    def finished(self, result: RunResult) -> None:
        """Write the summary."""
        for name, value in summary_lines(result):
            self._line(f"{name}: {value}")

    def _line(self, text: str) -> None:
        print(printable(text, keep=""), file=self._out, flush=True)
