"""The loop: step after step, with reports, validations, checkpoints, and an end in good order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_lora.adapter import Adapter
from jax_lora.data.batches import Batch, Batches
from jax_lora.dropout import dropout
from jax_lora.errors import DataError, LoraError, explain
from jax_lora.finetune.devices import data_mesh, replicate, split_rows
from jax_lora.finetune.interrupts import Interrupts
from jax_lora.finetune.memory import peak_memory
from jax_lora.finetune.run_folder import RunFolder
from jax_lora.finetune.schedule import make_schedule
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.step import (
    StepReport,
    TrainState,
    make_optimizer,
    make_step,
    make_validation,
    start,
)
from jax_lora.report.progress import Reporter, RunResult, TrainReport


class NonFiniteLossError(LoraError, FloatingPointError):
    """Training has produced a number that is none; the checkpoints before it are untouched."""


class TrainLoop:
    """One run of fine-tuning.

    Args:
      model: A decoder of `jax_lora.models`.
      variables: `{"params": params}`, the base; it is not changed.
      adapter: A fresh adapter.
      settings: What to do.
      batches: The training rows.
      validation: The validation rows, or None.
      run: Where checkpoints and metrics go.
      reporter: Who is told.
    """

    def __init__(
        self,
        model: Any,
        variables: Any,
        adapter: Adapter,
        settings: TrainSettings,
        *,
        batches: Batches,
        validation: Batches | None,
        run: RunFolder,
        reporter: Reporter,
    ):
        """Set up the optimizer and the state."""
        self._mesh = data_mesh(settings.batch_size, variables)
        self._variables, self._settings = replicate(variables, self._mesh), settings
        self._batches, self._validation = batches, validation
        self._run, self._reporter = run, reporter
        self.steps = settings.iterations(batches.per_epoch)
        self._schedule = _schedule(settings, self.steps)
        optimizer = make_optimizer(
            self._schedule,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        )
        self._state = replicate(start(adapter, optimizer), self._mesh)
        step = make_step(
            model,
            optimizer,
            accumulation=settings.grad_accumulation_steps,
            wrap=_dropout(settings),
        )
        self._programs = _Programs(step, reporter)
        self._measure = make_validation(model)
        self._window = _Window()
        self._val_loss: float | None = None
        self._padded = 0

    def train(self) -> RunResult:
        """Train until the steps are done, or a signal asks for an end.

        Returns:
          How it went.

        Raises:
          NonFiniteLossError: A loss is not finite.
          DataError: No token of a whole epoch was learned.
        """
        began = time.perf_counter()
        done = 0
        with Interrupts() as interrupts:
            while done < self.steps and not interrupts.requested:
                self._step(done)
                done += 1
                last = done == self.steps or bool(interrupts.requested)
                if last or done % self._settings.steps_per_report == 0:
                    self._report(done)
                if last or done % self._settings.steps_per_eval == 0:
                    self._validate(done)
                if last or done % self._settings.save_every == 0:
                    self._save(done)
        result = RunResult(
            steps=done,
            tokens=self._window.tokens,
            padded_tokens=self._padded,
            seconds=time.perf_counter() - began,
            compile_seconds=self._programs.seconds,
            val_loss=self._val_loss,
            best=self._run.best,
            checkpoint=self._save(done),
            peak_memory=peak_memory(),
            interrupted=interrupts.requested,
        )
        self._reporter.finished(result)
        return result

    def _step(self, index: int) -> None:
        batch = split_rows(self._batches.at(index), self._mesh)
        program = self._programs.of(self._state, self._variables, batch)
        began = time.perf_counter()
        self._state, report = program(self._state, self._variables, batch)
        loss = float(report.loss)
        seconds = time.perf_counter() - began
        if not math.isfinite(loss) or not math.isfinite(float(report.gradient_norm)):
            raise NonFiniteLossError(self._non_finite(index, loss, report))
        self._window.add(loss, float(report.tokens), self._batches.tokens(index), seconds)
        self._padded += batch.ids.size
        self._reporter.stepped(index + 1, loss)

    def _non_finite(self, index: int, loss: float, report: StepReport) -> str:
        lines = ", ".join(map(str, self._batches.lines(index)[:10]))
        return explain(
            f"step {index + 1}, rows at lines {lines}",
            got=f"loss {loss}, gradient norm {float(report.gradient_norm)}",
            expected="finite numbers",
            fix=f"Lower --learning-rate (now {self._settings.learning_rate:g}), or look at the "
            "rows. Checkpoints saved before are untouched.",
        )

    def _report(self, done: int) -> None:
        report = self._window.close(done, float(jnp.asarray(self._schedule(done - 1))))
        if report.loss == 0.0 and self._window.learned == 0 and done >= self._batches.per_epoch:
            raise DataError(
                explain(
                    f"the training rows, after {done} steps",
                    got="not one token to learn",
                    expected="answers that are learned",
                    fix="Check the rows, or pass --no-mask-prompt.",
                )
            )
        self._reporter.trained(report)
        self._run.log(
            {
                "iter": done,
                "train_loss": report.loss,
                "learning_rate": report.learning_rate,
                "it_per_second": report.steps_per_second,
                "tokens_per_second": report.tokens_per_second,
                "trained_tokens": report.tokens,
                "peak_memory_gb": report.peak_memory,
            }
        )

    def _validate(self, done: int) -> None:
        if self._validation is None:
            return
        began = time.perf_counter()
        self._val_loss = mean_loss(
            self._measure,
            self._state.adapter,
            self._variables,
            self._validation,
            self._settings.val_batches,
            place=lambda batch: split_rows(batch, self._mesh),
        )
        seconds = time.perf_counter() - began
        self._reporter.validated(done, self._val_loss, seconds)
        self._run.log({"iter": done, "val_loss": self._val_loss, "val_seconds": seconds})
        if self._run.note_validation(done, self._val_loss):
            self._save(done)

    def _save(self, done: int) -> Any:
        path, new = self._run.save(done, self._state.adapter, self._variables)
        if new:
            self._reporter.saved(done, path)
        return path


class _Programs:
    """The step, compiled once a shape, with the time of compiling kept apart."""

    def __init__(self, step: Any, reporter: Reporter):
        self._step, self._reporter = step, reporter
        self._compiled: dict[tuple[int, ...], Callable[..., Any]] = {}
        self.seconds = 0.0

    def of(self, state: TrainState, variables: Any, batch: Batch) -> Callable[..., Any]:
        shape = batch.ids.shape
        if shape not in self._compiled:
            self._reporter.compiling(shape[1])
            began = time.perf_counter()
            self._compiled[shape] = self._step.lower(state, variables, batch).compile()
            self.seconds += time.perf_counter() - began
        return self._compiled[shape]


class _Window:
    """Sums over the steps since the last report, and over all."""

    def __init__(self) -> None:
        self.tokens = 0
        self.learned = 0.0
        self._clear()

    def _clear(self) -> None:
        self._loss = self._learned = self._seconds = 0.0
        self._steps = self._tokens = 0

    def add(self, loss: float, learned: float, tokens: int, seconds: float) -> None:
        self._loss += loss * learned
        self._learned += learned
        self._tokens += tokens
        self._seconds += seconds
        self._steps += 1

    def close(self, step: int, learning_rate: float) -> TrainReport:
        self.tokens += self._tokens
        self.learned += self._learned
        seconds = max(self._seconds, 1e-9)
        report = TrainReport(
            step=step,
            loss=self._loss / max(self._learned, 1.0),
            learning_rate=learning_rate,
            steps_per_second=self._steps / seconds,
            tokens_per_second=self._tokens / seconds,
            tokens=self.tokens,
            peak_memory=peak_memory(),
        )
        self._clear()
        return report


def mean_loss(
    measure: Callable[..., Any],
    adapter: Adapter | None,
    variables: Any,
    batches: Batches,
    most: int = -1,
    *,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> float:
    """Measure the mean loss of the learned tokens.

    Args:
      measure: From `make_validation`.
      adapter: The adapter, or None for the base.
      variables: The base.
      batches: The rows.
      most: How many batches; -1 for all.
      place: Puts a batch on the devices.

    Returns:
      The mean over tokens, whatever batches they are in.
    """
    total = tokens = 0.0
    for number, batch in enumerate(batches.once()):
        if number == most:
            break
        loss, learned = measure(adapter, variables, place(batch))
        total, tokens = total + float(loss), tokens + float(learned)
    return total / max(tokens, 1.0)


def _schedule(settings: TrainSettings, steps: int) -> optax.Schedule:
    return make_schedule(
        settings.lr_schedule, settings.learning_rate, steps, warmup=settings.warmup
    )


def _dropout(settings: TrainSettings) -> Callable[[Any, jax.Array], Any] | None:
    if settings.dropout == 0.0:
        return None
    key = jax.random.key(settings.seed)
    return lambda combined, step: dropout(combined, jax.random.fold_in(key, step))
