"""Events of a training run, and the base class of the reporters that show them."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The plan of a run, shown before its first step.

    Args:
      model: Path or name of the base model.
      adapter: Short description of the adapter.
      data: Short description of the data.
      steps: Number of optimizer steps.
      notes: Notices for the user.
      hints: Suggested improvements.
    """

    model: str
    adapter: str
    data: str
    steps: int
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """Metrics of the steps since the last report.

    Args:
      step: Number of completed steps.
      loss: Mean loss since the last report.
      learning_rate: Learning rate at this step; None if unknown.
      steps_per_second: Speed, without compilation, validation and saving.
      tokens_per_second: Speed in tokens, without padding.
      tokens: Tokens of all steps so far, without padding.
      peak_memory: Peak memory in gigabytes.
      unit: What `tokens` counts: "Tokens", or "Targets" where batches are not of tokens.
    """

    step: int
    loss: float
    learning_rate: float | None
    steps_per_second: float
    tokens_per_second: float
    tokens: int
    peak_memory: float
    unit: str = "Tokens"


@dataclasses.dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Args:
      step: Number of completed steps.
      loss: Mean loss over the target tokens.
      seconds: Duration.
      best: Whether the loss is the lowest so far.
      samples: Pairs of prompt and response.
    """

    step: int
    loss: float
    seconds: float
    best: bool = False
    samples: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a training run.

    Args:
      steps: Number of completed steps.
      raw_tokens: Tokens of the text itself.
      tokens: Tokens including template, BOS and EOS tokens.
      padded_tokens: Tokens including padding.
      seconds: Duration of the training loop, compilation included.
      compile_seconds: Duration of compilation.
      programs: Number of compiled functions.
      val_loss: Last validation loss, or None.
      best: Best validation loss and its checkpoint, or None.
      checkpoint: The last checkpoint; None if nothing is saved.
      peak_memory: Measured peak memory in gigabytes.
      resident: Whether `peak_memory` is the process's resident memory instead of device memory.
      planned_memory: Memory that the compiler planned, in gigabytes; 0 if unknown.
      stopped_early: Whether early stopping ended the run.
      interrupted: Name of the signal that stopped the run, or None.
      unit: What `tokens` counts: "Tokens", or "Targets" where batches are not of tokens.
    """

    steps: int
    raw_tokens: int
    tokens: int
    padded_tokens: int
    seconds: float
    compile_seconds: float
    programs: int
    val_loss: float | None
    best: tuple[float, str] | None
    checkpoint: Path | None
    peak_memory: float
    resident: bool = False
    planned_memory: float = 0.0
    stopped_early: bool = False
    interrupted: str | None = None
    unit: str = "Tokens"


class Reporter:
    """Base class of reporters. Receives the events of a run in order, and ignores them."""

    def planned(self, plan: RunPlan) -> None:
        """Handle the start of the run."""

    def compiling(self, what: str, number: int) -> None:
        """Handle the start of compilation `number`, counted from 1."""

    def compiled(self, number: int, seconds: float, gigabytes: float) -> None:
        """Handle the end of a compilation; `gigabytes` is the planned memory, 0 if unknown."""

    def stepped(self, step: int, loss: float) -> None:
        """Handle the end of a step."""

    def trained(self, report: TrainReport) -> None:
        """Handle the metrics of the last steps."""

    def validated(self, validation: Validation) -> None:
        """Handle the result of a validation."""

    def saved(self, step: int, path: Path) -> None:
        """Handle a complete checkpoint."""

    def finished(self, result: RunResult) -> None:
        """Handle the end of the run."""
