"""What a run tells while it goes: events, and a reporter that writes one line for each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol, TextIO


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """The steps since the last report.

    Args:
      step: Updates made.
      loss: Mean loss of the learned tokens since the last report.
      learning_rate: At this step.
      steps_per_second: Without the time of compiling, validating and saving.
      tokens_per_second: Real tokens, no padding.
      tokens: Real tokens of all steps so far.
      peak_memory: Gigabytes.
    """

    step: int
    loss: float
    learning_rate: float
    steps_per_second: float
    tokens_per_second: float
    tokens: int
    peak_memory: float


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run is about to do, for its first lines.

    Args:
      model: Where the base comes from.
      adapter: The adapter in a few words.
      data: The data in a few words.
      steps: Updates to make.
      notes: Whatever else should be known.
    """

    model: str
    adapter: str
    data: str
    steps: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
      steps: Updates made.
      tokens: Real tokens seen.
      padded_tokens: The same with padding.
      seconds: The whole loop.
      compile_seconds: Compiling, within them.
      val_loss: Last validation loss, or None.
      best: Best validation loss and its checkpoint, or None.
      checkpoint: The last checkpoint.
      peak_memory: Gigabytes.
      interrupted: The signal that stopped it early, or None.
    """

    steps: int
    tokens: int
    padded_tokens: int
    seconds: float
    compile_seconds: float
    val_loss: float | None
    best: tuple[float, str] | None
    checkpoint: Path
    peak_memory: float
    interrupted: str | None = None


class Reporter(Protocol):
    """Is told the events of a run, in their order."""

    def planned(self, plan: RunPlan) -> None:
        """The run is about to begin."""

    def compiling(self, what: str, number: int) -> None:
        """A program for rows of another length is being compiled."""

    def stepped(self, step: int, loss: float) -> None:
        """A step is done."""

    def trained(self, report: TrainReport) -> None:
        """Some steps are done."""

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """The validation rows have been measured."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is in place."""

    def finished(self, result: RunResult) -> None:
        """The run is over."""


class PlainReporter:
    """Writes a line a report, as log parsers know them: for pipes, files and batch systems.

    Args:
      out: Where the lines go.
    """

    def __init__(self, out: TextIO):
        """Write to `out`."""
        self._out = out

    def _line(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def planned(self, plan: RunPlan) -> None:
        """Name the model, the adapter and the data."""
        self._line(f"Model: {plan.model}")
        self._line(f"LoRA: {plan.adapter}")
        self._line(f"Data: {plan.data}")
        for note in plan.notes:
            self._line(f"Note: {note}")
        self._line(f"Starting training..., iters: {plan.steps}")

    def compiling(self, what: str, number: int) -> None:
        """Say why nothing happens for a while."""
        self._line(f"Compiling program {number}: {what}")

    def stepped(self, step: int, loss: float) -> None:
        """Stay silent: steps are many."""

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

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """Write the validation loss."""
        self._line(f"Iter {step}: Val loss {loss:.3f}, Val took {seconds:.3f}s")

    def saved(self, step: int, path: Path) -> None:
        """Name the checkpoint."""
        self._line(f"Iter {step}: Saved adapter weights to {path}.")

    def finished(self, result: RunResult) -> None:
        """Write the summary."""
        for name, value in summary_lines(result):
            self._line(f"{name}: {value}")


class SilentReporter:
    """Says nothing; metrics.jsonl has it all."""

    def planned(self, plan: RunPlan) -> None:
        """Say nothing."""

    def compiling(self, what: str, number: int) -> None:
        """Say nothing."""

    def stepped(self, step: int, loss: float) -> None:
        """Say nothing."""

    def trained(self, report: TrainReport) -> None:
        """Say nothing."""

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """Say nothing."""

    def saved(self, step: int, path: Path) -> None:
        """Say nothing."""

    def finished(self, result: RunResult) -> None:
        """Say nothing."""


def summary_lines(result: RunResult) -> list[tuple[str, str]]:
    """Describe a finished run, as names and values.

    Args:
      result: The run.

    Returns:
      A line each.
    """
    working = max(result.seconds - result.compile_seconds, 1e-9)
    lines = [
        ("Steps", f"{result.steps}"),
        ("Tokens", f"{result.tokens:,} ({result.padded_tokens:,} with padding)"),
        ("Time", f"{result.seconds:.1f} s, of which {result.compile_seconds:.1f} s compiling"),
        ("Speed", f"{result.tokens / working:,.0f} tokens/s"),
        ("Peak memory", f"{result.peak_memory:.2f} GB"),
    ]
    if result.val_loss is not None:
        lines.append(("Validation loss", f"{result.val_loss:.4f}"))
    if result.best is not None:
        lines.append(("Best", f"{result.best[0]:.4f} at {result.best[1]}"))
    lines.append(("Checkpoint", str(result.checkpoint)))
    return lines
