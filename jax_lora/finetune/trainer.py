"""Trainer: the training loop for any model, loss, and batches, with exact resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_lora.adapter import Adapter
from jax_lora.errors import ConfigError, DataError, LoraError, format_error
from jax_lora.finetune.batch_source import all_batches, as_source, load_ahead, tokens_of, unit_of
from jax_lora.finetune.callbacks import Callback, Checkpoint, Report
from jax_lora.finetune.devices import replicate, split_rows
from jax_lora.finetune.interrupts import Interrupts
from jax_lora.finetune.memory import counts_resident_memory, peak_memory
from jax_lora.finetune.run_folder import RunFolder, checkpoint_name
from jax_lora.finetune.run_progress import RunProgress
from jax_lora.finetune.step import LossFn, StepReport, dropout_transform, init_state, make_step
from jax_lora.finetune.step_cache import StepCache
from jax_lora.finetune.trainable import as_trainable
from jax_lora.finetune.training_state import (
    find_resumable,
    load_opt_state,
    read_record,
    save_state,
)
from jax_lora.finetune.validation import make_validation, total_loss
from jax_lora.report.events import RunResult


class NonFiniteLossError(LoraError, FloatingPointError):
    """The loss or the gradient became NaN or infinite; earlier checkpoints are untouched."""


class Trainer:
    """One training run of any model.

    Use it for a model, a loss, and batches of your own: it compiles the step, validates, reports,
    saves checkpoints, ends in good order at Ctrl-C, and resumes to the bit. The command
    `jax-lora train` runs this class.

    Args:
      loss_fn: `loss_fn(variables, batch) -> (sum of losses, weight)`, as in `make_step`.
      variables: The base model's variables: any tree. They are not changed.
      adapter: The adapter to train, from `lora_init`; or None to train all variables.
      optimizer: An Optax optimizer for the trainable parameters alone; no mask is needed.
      batches: A sequence of batches (one epoch, repeated), a function from a step to its batch, or
        an iterable. A batch is any pytree of arrays.
      steps: Number of updates; None: one epoch.
      run: Folder for checkpoints, or None to save nothing. An earlier run in it is moved aside,
        unless it is resumed.
      resume: True or `"auto"` continues the run in `run` if there is one; a path continues from
        that run or checkpoint.
      callbacks: What happens between steps; None: `Report()` and, with `run`, `Checkpoint()`.
      accumulation: Parts that a batch is split into, to save memory.
      seed: Determines dropout, whose rate is the adapter's (`LoraConfig.dropout`).
      mesh: Devices that share the rows of a batch, along the axis `"data"`; each holds the whole
        model. None: arrays stay where they are, which suits variables that are sharded already.
      record: Plain values that are stored in every checkpoint.

    Raises:
      ConfigError: No number of steps is given and the batches have no length, or `resume` names no
        run.
      CheckpointError: The checkpoint is damaged, or belongs to another base model or optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jax_lora as jl
      >>> def loss_fn(variables, batch):
      ...     error = batch["x"] @ variables["kernel"] - batch["y"]
      ...     return jnp.sum(error**2), jnp.float32(error.shape[0])
      >>> variables = {"kernel": jnp.zeros((4, 2))}
      >>> adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=2))
      >>> batches = [{"x": jnp.ones((3, 4)), "y": jnp.ones((3, 2))}]
      >>> trainer = Trainer(
      ...     loss_fn, variables, adapter, optax.sgd(0.01), batches, steps=100, callbacks=[]
      ... )
      >>> trainer.train().steps
      100
      >>> trainer.evaluate(batches) < 0.1
      True
    """

    def __init__(
        self,
        loss_fn: LossFn,
        variables: Any,
        adapter: Any,
        optimizer: optax.GradientTransformation,
        batches: Any,
        *,
        steps: int | None = None,
        run: str | Path | RunFolder | None = None,
        resume: bool | str | Path = False,
        callbacks: Sequence[Callback] | None = None,
        accumulation: int = 1,
        seed: int = 0,
        mesh: Mesh | None = None,
        record: dict[str, Any] | None = None,
    ):
        """Make the state, or restore it."""
        self._trainable = as_trainable(variables, adapter)
        self._batches, self._mesh, self._record = as_source(batches), mesh, record or {}
        self.steps = self._check_steps(steps)
        self.progress = RunProgress()
        self._frozen = self._replicated(self._trainable.frozen)
        start, in_place = self._trainable.start, self._trainable.in_place
        self._state = self._replicated(init_state(start, optimizer, in_place=in_place))
        rate = start.config.dropout if isinstance(start, Adapter) else 0.0
        self._step_cache = StepCache(
            make_step(
                loss_fn,
                optimizer,
                accumulation=accumulation,
                transform=dropout_transform(rate, seed),
                join=self._trainable.join,
            ),
            self,
        )
        self._measure = make_validation(loss_fn, join=self._trainable.join)
        self._run, checkpoint = _run_folder(run, resume)
        if callbacks is None:
            callbacks = [Report(), *([Checkpoint()] if self._run is not None else [])]
        self.callbacks = tuple(callbacks)
        self._stopping = self._stopped_early = False
        if checkpoint is not None:
            self._restore(checkpoint)

    # -------------------------------------------------------------------------------------------
    # The state of the run
    # -------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Number of updates made."""
        return self.progress.step

    @property
    def adapter(self) -> Any:
        """The trained adapter (in full fine-tuning the variables) as it is now.

        The next step donates its arrays: copy them with `jax.tree.map(jnp.array, ...)` to keep
        them.
        """
        return self._state.trainable

    @property
    def variables(self) -> Any:
        """The combined variables, for `lora_apply(model.apply)`."""
        return self._trainable.join(self._frozen, self._state.trainable)

    @property
    def unit(self) -> str:
        """What the run counts: "Tokens", or "Targets" where batches are not of tokens."""
        return unit_of(self._batches)

    def is_due(self, every: int) -> bool:
        """Tell whether something that happens every few steps is due after this one."""
        return self.step % every == 0 or self.step == self.steps

    def stop(self, *, early: bool = False) -> None:
        """End the run after this step.

        Args:
          early: Whether the reason is that the validation loss stopped improving.
        """
        self._stopping, self._stopped_early = True, early

    def notify(self, event: str, *args: Any) -> None:
        """Call a method of every callback.

        Args:
          event: Its name, such as `"on_validation"`.
          *args: Its arguments after the trainer.
        """
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    # -------------------------------------------------------------------------------------------
    # Training
    # -------------------------------------------------------------------------------------------

    def train(self) -> RunResult:
        """Train until the last step, a callback's `stop`, Ctrl-C, or SIGTERM.

        Returns:
          A summary of the run.

        Raises:
          NonFiniteLossError: A loss or a gradient is NaN or infinite.
          DataError: A whole epoch had no target.
        """
        progress = self.progress
        before, began = progress.seconds, time.perf_counter()
        batches = load_ahead(self._batches, progress.step, self.steps)
        with Interrupts() as interrupts:
            while progress.step < self.steps and not self._stopping and not interrupts.requested:
                loss = self._update(next(batches))
                progress.seconds = before + time.perf_counter() - began
                self.notify("on_step", loss)
        result = self._result(interrupts.requested)
        self.notify("on_end", result)
        return result

    def evaluate(self, batches: Any, limit: int = -1) -> float:
        """Return the mean loss on some batches.

        Args:
          batches: A sequence, or another iterable, of batches.
          limit: How many to use; -1 for all.

        Returns:
          The sum of the losses over the sum of the weights.
        """
        state, each = self._state.trainable, all_batches(batches)
        total, weight = total_loss(
            self._measure, state, self._frozen, each, limit, place=self._placed
        )
        return total / weight if weight else 0.0

    def compile(self) -> int:
        """Compile the first step without running it.

        Returns:
          Its planned memory in bytes; 0 where the platform does not say.
        """
        batch = self._placed(self._batches.at(self.step))
        self._step_cache.compiled(self._state, self._frozen, batch)
        return self._step_cache.planned_bytes

    def save(self, *, keep: int = 3) -> Path | None:
        """Save a checkpoint of this step; nothing happens if there is one, or no run folder.

        Args:
          keep: How many checkpoints to keep, besides the best one.

        Returns:
          The checkpoint's folder; None without a run folder.
        """
        if self._run is None:
            return None
        record = {"ledger": self.progress.to_dict(), **self._record}

        def write(folder: Path) -> None:
            self._trainable.save(folder, self._state.trainable)
            save_state(folder, self._state.opt_state, record)

        path, new = self._run.save(self.step, write, self._best, keep=keep)
        if new:
            self.notify("on_save", path)
        return path

    def describe_shape(self, batch: Any) -> str:
        """Describe a batch's shape, for messages."""
        return self._batches.describe_shape(batch)

    def _update(self, batch: Any) -> float:
        index, placed = self.step, self._placed(batch)
        compiled = self._step_cache.compiled(self._state, self._frozen, placed)
        began = time.perf_counter()
        self._state, report = compiled(self._state, self._frozen, placed)
        loss, weight = float(report.loss), float(report.weight)
        seconds = time.perf_counter() - began
        if not math.isfinite(loss) or not math.isfinite(float(report.gradient_norm)):
            raise NonFiniteLossError(self._non_finite(index, loss, report))
        tokens = tokens_of(self._batches, index, batch, weight)
        self.progress.add_step(loss, weight, tokens, seconds)
        self._refuse_empty_epoch()
        return loss

    def _non_finite(self, index: int, loss: float, report: StepReport) -> str:
        return format_error(
            f"step {index + 1}, {self._batches.describe(index)}",
            got=f"loss {loss}, gradient norm {float(report.gradient_norm)}",
            expected="finite values",
            fix="Lower the learning rate, or inspect these examples. Earlier checkpoints are "
            "untouched.",
        )

    def _refuse_empty_epoch(self) -> None:
        epoch = self._batches.per_epoch
        if epoch is None or self.step != epoch or self.progress.weight:
            return
        raise DataError(
            format_error(
                f"the training batches, after {self.step} steps",
                got="not one target token",
                expected="at least one target token",
                fix="Check the examples, or include the prompts in the loss (mask_prompt false).",
            )
        )

    # -------------------------------------------------------------------------------------------
    # Start and end
    # -------------------------------------------------------------------------------------------

    def _check_steps(self, steps: int | None) -> int:
        chosen = self._batches.per_epoch if steps is None else steps
        if isinstance(chosen, int) and not isinstance(chosen, bool) and chosen >= 1:
            return chosen
        raise ConfigError(
            format_error(
                "Trainer: steps",
                got=repr(steps),
                expected="an integer of at least 1"
                if steps is not None
                else "a number of steps, because these batches have no length",
                fix="Pass steps=1000, say.",
            )
        )

    def _replicated(self, tree: Any) -> Any:
        return tree if self._mesh is None else replicate(tree, self._mesh)

    def _placed(self, batch: Any) -> Any:
        return batch if self._mesh is None else split_rows(batch, self._mesh)

    def _restore(self, checkpoint: Path) -> None:
        record = read_record(checkpoint)
        self.progress = RunProgress.from_dict(record.get("ledger"), str(checkpoint))
        state = self._state._replace(
            trainable=self._trainable.load(checkpoint),
            opt_state=load_opt_state(checkpoint, record, self._state.opt_state),
            step=jnp.int32(self.progress.step),
        )
        self._state = self._replicated(state)

    @property
    def _best(self) -> tuple[float, int] | None:
        loss, step = self.progress.best_loss, self.progress.best_step
        return None if loss is None or step is None else (loss, step)

    def _result(self, interrupted: str | None) -> RunResult:
        progress = self.progress
        return RunResult(
            steps=progress.step,
            raw_tokens=progress.raw,
            tokens=progress.tokens,
            padded_tokens=progress.padded,
            seconds=progress.seconds,
            compile_seconds=self._step_cache.seconds,
            programs=len(self._step_cache),
            val_loss=progress.val_loss,
            best=self._best and (self._best[0], checkpoint_name(self._best[1])),
            checkpoint=self.save(),
            peak_memory=peak_memory(),
            resident=counts_resident_memory(),
            planned_memory=self._step_cache.planned_bytes / 1e9,
            stopped_early=self._stopped_early,
            interrupted=interrupted,
            unit=self.unit,
        )


def _run_folder(
    run: str | Path | RunFolder | None, resume: bool | str | Path
) -> tuple[RunFolder | None, Path | None]:
    """Prepare the folder of a run, and find the checkpoint to continue from."""
    automatic = resume is True or resume == "auto"
    source = (run.path if isinstance(run, RunFolder) else run) if automatic else (resume or None)
    checkpoint = None if source is None else find_resumable(str(source))
    if checkpoint is None and source is not None and not automatic:
        raise ConfigError(
            format_error(
                f"Trainer: resume={str(resume)!r}",
                got="no run with a checkpoint there",
                expected="the folder of a run, or one of its checkpoints",
                fix='Check the path, or pass resume="auto" to start a run if there is none.',
            )
        )
    if isinstance(run, RunFolder):
        return run, checkpoint
    if checkpoint is None:
        return (None if run is None else RunFolder.prepare(run)[0]), None
    if run is None or checkpoint.parent.resolve() == Path(run).resolve():
        return RunFolder.resume(checkpoint.parent, checkpoint=checkpoint.name)[0], checkpoint
    return RunFolder.prepare(run)[0], checkpoint
