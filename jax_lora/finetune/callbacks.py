"""Callbacks: what a training run does between its steps.

    Report        shows and logs losses and speed
    Validate      measures the loss on held-out batches
    Checkpoint    saves every few steps, at the best validation, and at the end
    EarlyStop     ends the run when the validation loss stops improving

A callback of your own is a subclass of `Callback` that overrides one or two methods.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_lora.finetune.batch_source import all_batches
from jax_lora.report.events import Reporter, RunResult, Validation
from jax_lora.report.plain_reporter import PlainReporter

if TYPE_CHECKING:
    from jax_lora.finetune.trainer import Trainer

Log = Callable[[dict[str, Any]], None]


class Callback:
    """Is called by `Trainer.train`; every method does nothing unless overridden.

    Example:
      >>> class StopAtLoss(Callback):
      ...     def on_step(self, trainer, loss):
      ...         if loss < 0.1:
      ...             trainer.stop()
    """

    def on_compile(self, trainer: Trainer, shape: str, number: int) -> None:
        """Compilation of the step for another batch shape begins; it is the n-th."""

    def on_compiled(self, trainer: Trainer, number: int, seconds: float, gigabytes: float) -> None:
        """Compilation has ended; `gigabytes` is its planned memory, 0 if unknown."""

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """A step has ended, with the mean loss of its batch before the update."""

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        """Whether `on_step` uses the trained parameters, or may stop the run, after a step.

        If no callback does, the trainer starts the next step before it reads the numbers of this
        one, so that an accelerator never waits. Override it together with `on_step`.
        """
        return type(self).on_step is not Callback.on_step

    def on_validation(self, trainer: Trainer, validation: Validation) -> None:
        """The validation loss has been measured."""

    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        """A new checkpoint is complete."""

    def on_end(self, trainer: Trainer, result: RunResult) -> None:
        """The run has ended, after its last step or early."""


class Report(Callback):
    """Shows losses and speed, and logs them.

    Args:
      every: Steps between two reports.
      reporter: Shows them; None prints lines.
      log: Receives the values of each report and validation: `wandb.log`, say.
      schedule: The learning rate by step, to be reported.
    """

    def __init__(
        self,
        every: int = 10,
        *,
        reporter: Reporter | None = None,
        log: Log | None = None,
        schedule: Callable[[int], Any] | None = None,
    ):
        """Choose how to show a run."""
        self._every, self._schedule = every, schedule
        self._reporter = PlainReporter(sys.stdout) if reporter is None else reporter
        self._log: Log = log or (lambda values: None)

    def on_compile(self, trainer: Trainer, shape: str, number: int) -> None:
        """Tell the reporter."""
        self._reporter.compiling(shape, number)

    def on_compiled(self, trainer: Trainer, number: int, seconds: float, gigabytes: float) -> None:
        """Tell the reporter."""
        self._reporter.compiled(number, seconds, gigabytes)

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        """A report reads the numbers of a step only."""
        return False

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Report every few steps, and at the last one."""
        self._reporter.stepped(trainer.step, loss)
        if not trainer.is_due(self._every):
            return
        rate = None if self._schedule is None else float(self._schedule(trainer.step - 1))
        report = trainer.progress.close_window(rate, unit=trainer.unit)
        self._reporter.trained(report)
        self._log(
            {
                "iter": report.step,
                "train_loss": report.loss,
                **({} if rate is None else {"learning_rate": rate}),
                "it_per_second": report.steps_per_second,
                "tokens_per_second": report.tokens_per_second,
                "trained_tokens": report.tokens,
                "peak_memory_gb": report.peak_memory,
            }
        )

    def on_validation(self, trainer: Trainer, validation: Validation) -> None:
        """Show and log the loss."""
        self._reporter.validated(validation)
        seconds = validation.seconds
        self._log({"iter": trainer.step, "val_loss": validation.loss, "val_seconds": seconds})

    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        """Tell the reporter."""
        self._reporter.saved(trainer.step, checkpoint)

    def on_end(self, trainer: Trainer, result: RunResult) -> None:
        """Show the summary."""
        self._reporter.finished(result)


class Validate(Callback):
    """Measures the loss on held-out batches, every few steps and after the last one.

    Args:
      batches: A sequence of batches, or an iterable that starts anew every time.
      every: Steps between two validations.
      limit: How many batches to use; -1 for all.
      samples: Called with the combined variables; returns prompts with the model's completions.
    """

    def __init__(
        self,
        batches: Any,
        every: int = 200,
        *,
        limit: int = -1,
        samples: Callable[[Any], tuple[tuple[str, str], ...]] | None = None,
    ):
        """Keep the batches."""
        all_batches(batches)  # refuses an iterator before the run begins
        self._batches, self._every, self._limit, self._samples = batches, every, limit, samples

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        """Whether a validation is due."""
        return trainer.is_due(self._every, step)

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Validate if it is time to."""
        if not trainer.is_due(self._every):
            return
        began = time.perf_counter()
        value = trainer.evaluate(self._batches, self._limit)
        seconds = time.perf_counter() - began
        best = trainer.progress.add_validation(value)
        samples = () if self._samples is None else self._samples(trainer.variables)
        trainer.notify("on_validation", Validation(trainer.step, value, seconds, best, samples))


class Checkpoint(Callback):
    """Saves the run: every few steps, at each new best validation loss, and at the end.

    Args:
      every: Steps between two checkpoints.
      keep: How many to keep, besides the best one.
      save_best: Save whenever the validation loss is the lowest so far.
    """

    def __init__(self, every: int = 200, *, keep: int = 3, save_best: bool = True):
        """Keep the settings."""
        self._every, self.keep, self._save_best = every, keep, save_best

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        """Whether a checkpoint is due."""
        return trainer.is_due(self._every, step)

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Save if it is time to."""
        if trainer.is_due(self._every):
            trainer.save(keep=self.keep)

    def on_validation(self, trainer: Trainer, validation: Validation) -> None:
        """Save the best so far."""
        if validation.best and self._save_best:
            trainer.save(keep=self.keep)


class EarlyStop(Callback):
    """Ends the run after several validations without a lower loss.

    Args:
      patience: How many validations.
    """

    def __init__(self, patience: int):
        """Keep the patience."""
        self._patience = patience

    def on_validation(self, trainer: Trainer, validation: Validation) -> None:
        """Stop when patience ends."""
        if trainer.progress.unimproved >= self._patience:
            trainer.stop(early=True)
