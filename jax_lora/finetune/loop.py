"""The loop: step after step, with reports, validations, checkpoints, and an end in good order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_lora.data.batches import Batch, Batches
from jax_lora.data.loading import load_ahead
from jax_lora.dropout import dropout
from jax_lora.errors import DataError, LoraError, format_error
from jax_lora.finetune.devices import data_mesh, replicate, split_rows
from jax_lora.finetune.interrupts import Interrupts
from jax_lora.finetune.memory import counts_resident_memory, peak_memory
from jax_lora.finetune.optimizer_factory import make_optimizer
from jax_lora.finetune.run_folder import RunFolder, checkpoint_name
from jax_lora.finetune.run_progress import Ledger, Tokens
from jax_lora.finetune.samples import Sampler
from jax_lora.finetune.schedule import make_schedule
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.step import StepReport, make_step, make_validation, start
from jax_lora.finetune.step_cache import Programs
from jax_lora.finetune.total_loss import total_loss
from jax_lora.finetune.trainable import Trainable
from jax_lora.finetune.training_state import load_moments, save_state
from jax_lora.report.events import Reporter, RunResult, Validation


class NonFiniteLossError(LoraError, FloatingPointError):
    """Training has produced a number that is none; the checkpoints before it are untouched."""


class TrainLoop:
    """One run of fine-tuning.

    Args:
      model: A decoder of `jax_lora.models`.
      trainable: What is trained, and what is frozen.
      settings: What to do.
      batches: The training rows.
      validation: The validation rows, or None.
      run: Where checkpoints go.
      reporter: Who is told.
      log: Takes the numbers of every report and validation.
      sampler: Answers prompts at every validation, or None.
      facts: What else is written beside every checkpoint, to be compared when the run is resumed.
    """

    def __init__(
        self,
        model: Any,
        trainable: Trainable,
        settings: TrainSettings,
        *,
        batches: Batches,
        validation: Batches | None,
        run: RunFolder,
        reporter: Reporter,
        log: Callable[[dict[str, Any]], None] = lambda values: None,
        sampler: Sampler | None = None,
        facts: dict[str, Any] | None = None,
    ):
        """Set up the optimizer and the state."""
        self._mesh = data_mesh(settings.batch_size, (trainable.frozen, trainable.start))
        self._trainable, self._settings = trainable, settings
        self._frozen = replicate(trainable.frozen, self._mesh)
        self._batches, self._validation = batches, validation
        self._run, self._reporter, self._sampler, self._log = run, reporter, sampler, log
        self._facts = facts or {}
        self.steps = settings.iterations(batches.per_epoch)
        self._schedule = _schedule(settings, self.steps)
        self._optimizer = make_optimizer(
            self._schedule,
            name=settings.optimizer,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lora_plus_ratio=settings.lora_plus_ratio,
        )
        fresh = start(trainable.start, self._optimizer, in_place=trainable.in_place)
        self._state = replicate(fresh, self._mesh)
        step = make_step(
            model,
            self._optimizer,
            accumulation=settings.grad_accumulation_steps,
            wrap=_dropout(settings),
            join=trainable.join,
            chunk=settings.loss_chunk,
        )
        self._programs = Programs(step, reporter)
        self._measure = make_validation(model, join=trainable.join, chunk=settings.loss_chunk)
        self._ledger = Ledger()

    # -------------------------------------------------------------------------------------------
    # From the first step to the last
    # -------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Path, record: dict[str, Any]) -> int:
        """Go on where a run was left.

        Args:
          checkpoint: One of the run's checkpoints.
          record: What `read_record` found there.

        Returns:
          The steps that are done.

        Raises:
          CheckpointError: The checkpoint is damaged, or belongs to another base or optimizer.
        """
        self._ledger = Ledger.from_dict(record.get("ledger"), str(checkpoint))
        state = self._state._replace(
            trained=self._trainable.load(checkpoint),
            moments=load_moments(checkpoint, record, self._state.moments),
            step=jnp.int32(self._ledger.step),
        )
        self._state = replicate(state, self._mesh)
        return self._ledger.step

    def compile(self) -> int:
        """Compile the first step and do nothing with it.

        Returns:
          The bytes that it needs.
        """
        self._programs.of(self._state, self._frozen, split_rows(self._batches.at(0), self._mesh))
        return self._programs.planned_bytes

    def train(self) -> RunResult:
        """Train until the steps are done, patience ends, or a signal asks for an end.

        Returns:
          How it went.

        Raises:
          NonFiniteLossError: A loss is not finite.
          DataError: No token of a whole epoch was learned.
        """
        ledger, settings = self._ledger, self._settings
        before, began = ledger.seconds, time.perf_counter()
        batches = load_ahead(self._batches, ledger.step, self.steps)
        stop = False
        with Interrupts() as interrupts:
            while ledger.step < self.steps and not stop and not interrupts.requested:
                self._step(next(batches))
                ledger.seconds = before + time.perf_counter() - began
                last = ledger.step == self.steps
                if last or ledger.step % settings.steps_per_report == 0:
                    self._report()
                if last or ledger.step % settings.steps_per_eval == 0:
                    stop = self._validate()
                if last or ledger.step % settings.save_every == 0:
                    self._save()
        result = RunResult(
            steps=ledger.step,
            raw_tokens=ledger.raw,
            tokens=ledger.tokens,
            padded_tokens=ledger.padded,
            seconds=ledger.seconds,
            compile_seconds=self._programs.seconds,
            programs=len(self._programs),
            val_loss=ledger.val_loss,
            best=self._best and (self._best[0], checkpoint_name(self._best[1])),
            checkpoint=self._save(),
            peak_memory=peak_memory(),
            resident=counts_resident_memory(),
            planned_memory=self._programs.planned_bytes / 1e9,
            stopped_early=stop,
            interrupted=interrupts.requested,
        )
        self._reporter.finished(result)
        return result

    @property
    def _best(self) -> tuple[float, int] | None:
        loss, step = self._ledger.best_loss, self._ledger.best_step
        return None if loss is None or step is None else (loss, step)

    # -------------------------------------------------------------------------------------------
    # What happens at a step
    # -------------------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> None:
        index = self._ledger.step
        placed = split_rows(batch, self._mesh)
        program = self._programs.of(self._state, self._frozen, placed)
        began = time.perf_counter()
        self._state, report = program(self._state, self._frozen, placed)
        loss = float(report.loss)
        seconds = time.perf_counter() - began
        if not math.isfinite(loss) or not math.isfinite(float(report.gradient_norm)):
            raise NonFiniteLossError(self._non_finite(index, loss, report))
        tokens = Tokens(
            self._batches.raw_tokens(index), self._batches.tokens(index), batch.ids.size
        )
        self._ledger.add_step(loss, float(report.tokens), tokens, seconds)
        self._reporter.stepped(index + 1, loss)

    def _non_finite(self, index: int, loss: float, report: StepReport) -> str:
        lines = ", ".join(map(str, self._batches.lines(index)[:10]))
        return format_error(
            f"step {index + 1}, rows at lines {lines}",
            got=f"loss {loss}, gradient norm {float(report.gradient_norm)}",
            expected="finite numbers",
            fix=f"Lower --learning-rate (now {self._settings.learning_rate:g}), or look at the "
            "rows. Checkpoints saved before are untouched.",
        )

    def _report(self) -> None:
        ledger = self._ledger
        report = ledger.close_window(float(jnp.asarray(self._schedule(ledger.step - 1))))
        if ledger.learned == 0 and ledger.step >= self._batches.per_epoch:
            raise DataError(
                format_error(
                    f"the training rows, after {ledger.step} steps",
                    got="not one token to learn",
                    expected="answers that are learned",
                    fix="Check the rows, or pass --no-mask-prompt.",
                )
            )
        self._reporter.trained(report)
        self._log(
            {
                "iter": report.step,
                "train_loss": report.loss,
                "learning_rate": report.learning_rate,
                "it_per_second": report.steps_per_second,
                "tokens_per_second": report.tokens_per_second,
                "trained_tokens": report.tokens,
                "peak_memory_gb": report.peak_memory,
            }
        )

    def _validate(self) -> bool:
        """Measure, and tell whether patience is at its end."""
        if self._validation is None:
            return False
        began = time.perf_counter()
        step, settings = self._ledger.step, self._settings
        total, tokens = total_loss(
            self._measure,
            self._state.trained,
            self._frozen,
            self._validation,
            settings.val_batches,
            place=lambda batch: split_rows(batch, self._mesh),
        )
        loss = total / max(tokens, 1.0)
        seconds = time.perf_counter() - began
        best = self._ledger.add_validation(loss)
        answers = self._samples()
        self._reporter.validated(Validation(step, loss, seconds, best, answers))
        self._log({"iter": step, "val_loss": loss, "val_seconds": seconds})
        if best and settings.save_best:
            self._save()
        return settings.early_stop is not None and self._ledger.unimproved >= settings.early_stop

    def _samples(self) -> tuple[tuple[str, str], ...]:
        if self._sampler is None:
            return ()
        return self._sampler.answers(self._trainable.join(self._frozen, self._state.trained))

    def _save(self) -> Path:
        record = {
            "ledger": self._ledger.to_dict(),
            "settings": self._settings.as_dict(),
            **self._facts,
        }

        def write(folder: Path) -> None:
            self._trainable.save(folder, self._state.trained)
            save_state(folder, self._state.moments, record)

        path, new = self._run.save(self._ledger.step, write, self._best)
        if new:
            self._reporter.saved(self._ledger.step, path)
        return path


def _schedule(settings: TrainSettings, steps: int) -> optax.Schedule:
    return make_schedule(
        settings.lr_schedule, settings.learning_rate, steps, warmup=settings.warmup
    )


def _dropout(settings: TrainSettings) -> Callable[[Any, jax.Array], Any] | None:
    if settings.dropout == 0.0 or settings.fine_tune_type == "full":
        return None
    key = jax.random.key(settings.seed)
    return lambda combined, step: dropout(combined, jax.random.fold_in(key, step))
