"""What a run tells while it goes: its events, and the reporter that is told and says nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run is about to do, for its first lines.

    Args:
      model: Where the base comes from.
      adapter: The adapter in a few words.
      data: The data in a few words.
      steps: Updates to make.
      notes: What should be known.
      hints: What could be done better.
    """

    model: str
    adapter: str
    data: str
    steps: int
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


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
class Validation:
    """The validation rows, measured.

    Args:
      step: Updates made.
      loss: Mean loss of the learned tokens.
      seconds: What it took.
      best: Whether it is the lowest yet.
      samples: Prompts with their answers.
    """

    step: int
    loss: float
    seconds: float
    best: bool = False
    samples: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
      steps: Updates made.
      raw_tokens: Tokens of the rows' own text.
      tokens: The same with template, start and end tokens.
      padded_tokens: The same with padding.
      seconds: The whole loop.
      compile_seconds: Compiling, within them.
      programs: Programs compiled.
      val_loss: Last validation loss, or None.
      best: Best validation loss and its checkpoint, or None.
      checkpoint: The last checkpoint.
      peak_memory: Gigabytes, measured.
      resident: Whether that is the whole process's resident memory, and not the device's own.
      planned_memory: Gigabytes that the programs were to need; 0 where nobody knows.
      stopped_early: Whether patience ended before the steps did.
      interrupted: The signal that stopped it, or None.
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
    checkpoint: Path
    peak_memory: float
    resident: bool = False
    planned_memory: float = 0.0
    stopped_early: bool = False
    interrupted: str | None = None


class Reporter:
    """Is told the events of a run, in their order; this one says nothing."""

    def planned(self, plan: RunPlan) -> None:
        """The run is about to begin."""

    def compiling(self, what: str, number: int) -> None:
        """Another program is being compiled; so far there are `number`."""

    def compiled(self, number: int, seconds: float, gigabytes: float) -> None:
        """It is there, and needs so much memory; 0 where nobody knows."""

    def stepped(self, step: int, loss: float) -> None:
        """A step is done."""

    def trained(self, report: TrainReport) -> None:
        """Some steps are done."""

    def validated(self, validation: Validation) -> None:
        """The validation rows have been measured."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is in place."""

    def finished(self, result: RunResult) -> None:
        """The run is over."""
