"""Trainer: the training loop for any model, loss, and batches, with exact resumption."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_lora.adapter import Adapter
from jax_lora.errors import ConfigError, DataError, LoraError
from jax_lora.finetune.batch_source import (
    RowShare,
    all_batches,
    as_source,
    load_ahead,
    take_rows,
    tokens_of,
    unit_of,
)
from jax_lora.finetune.callbacks import Callback, Checkpoint, Report
from jax_lora.finetune.interrupts import Interrupts
from jax_lora.finetune.memory import (
    counts_resident_memory,
    peak_memory,
    release_freed_memory,
)
from jax_lora.finetune.process_group import ProcessGroup, process_group
from jax_lora.finetune.run_folder import RunFolder, checkpoint_name
from jax_lora.finetune.run_progress import RunProgress
from jax_lora.finetune.state_sharding import placed_or_replicated, state_shardings
from jax_lora.finetune.step import (
    LossFn,
    StepReport,
    TrainState,
    dropout_transform,
    init_state,
    make_step,
)
from jax_lora.finetune.step_cache import StepCache
from jax_lora.finetune.trainable import as_trainable
from jax_lora.finetune.training_state import find_resumable, load_opt_state, read_record, save_state
from jax_lora.finetune.validation import make_validation, total_loss
from jax_lora.report.events import RunResult
from jax_lora.sharding import adapter_shardings


class NonFiniteLossError(LoraError, FloatingPointError):
    """The loss or the gradient became NaN or infinite; earlier checkpoints are untouched."""


class _RunningStep(NamedTuple):
    """A step that the device may still compute."""

    number: int
    batch: Any
    report: StepReport
    began: float
    hear: Callable[[], None]  # learns whether a process has received a signal


class Trainer:
    """A training run of any model.

    Use it to train your own model with your own loss and batches. It compiles the step, validates,
    reports, saves checkpoints, handles Ctrl-C, and resumes bit for bit. The command
    `jax-lora train` uses this class.

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
      callbacks: Callbacks; None: `Report()` and, with `run`, `Checkpoint()`.
      accumulation: Number of micro-batches that a batch is split into, to save memory.
      seed: Random seed of dropout; its rate is `LoraConfig.dropout` of the adapter.
      mesh: Devices that share the rows of a batch along the axes `"data"` and `"fsdp"`. Variables
        that are sharded over this mesh stay so, and the others are replicated; the adapter and the
        optimizer state are sharded like the variables. None: arrays are not moved. With several
        processes of `jax.distributed`, the mesh has devices of all of them, each process creates
        the same trainer with the batches of all rows, and the first one writes to `run`.
      record: Plain values that are stored in every checkpoint.

    Raises:
      ConfigError: `steps` is None and the batches have no length, there is no run to resume, or
        the mesh has no device of some process.
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
        """Create the state, or restore it."""
        self._trainable = as_trainable(variables, adapter)
        self._batches, self._mesh, self._record = as_source(batches), mesh, record or {}
        self._processes = process_group()
        self._processes.check_mesh(mesh)
        self.steps = self._check_steps(steps)
        self.progress = RunProgress()
        start = self._trainable.start
        self._own_rows = functools.partial(self._processes.own_rows, mesh)
        self._frozen, self._state, self._shardings = self._initial(optimizer)
        rate = start.config.dropout if isinstance(start, Adapter) else 0.0
        self._step_cache = StepCache(
            make_step(
                loss_fn,
                optimizer,
                accumulation=accumulation,
                transform=dropout_transform(rate, seed),
                join=self._trainable.join,
                state_shardings=self._shardings,
            ),
            self,
        )
        self._measure = make_validation(loss_fn, join=self._trainable.join)
        self._run, checkpoint = _run_folder(run, resume, self._processes)
        if callbacks is None:
            callbacks = [Report(), *([Checkpoint()] if self._run is not None else [])]
        self.callbacks = tuple(callbacks)
        self._stopping = self._stopped_early = False
        self._before = self._began = self._ended = 0.0
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
        """The current adapter; in full fine-tuning, the current variables.

        The next step donates its arrays. Copy them with `jax.tree.map(jnp.array, ...)` to keep
        them.
        """
        return self._state.trainable

    @property
    def variables(self) -> Any:
        """The combined variables, for `lora_apply(model.apply)`."""
        return self._trainable.join(self._frozen, self._state.trainable)

    @property
    def unit(self) -> str:
        """The unit of the run's counts: "Tokens", or "Targets" if the batches have no tokens."""
        return unit_of(self._batches)

    def is_due(self, every: int, step: int | None = None) -> bool:
        """Return whether an action that happens every few steps is due.

        Args:
          every: Steps between two actions; it is due after the last step too.
          step: Number of updates made; None: as of now.
        """
        step = self.step if step is None else step
        return step % every == 0 or step == self.steps

    def stop(self, *, early: bool = False) -> None:
        """End the run after this step; with several processes, all of them must call it.

        Args:
          early: Whether the validation loss stopped improving.
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
          CheckpointError: Another process writes to the run's folder, or it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            if self._run is not None:
                owned = self._run.owned()
                self._processes.first(lambda: stack.enter_context(owned))
            return self._train()

    def _train(self) -> RunResult:
        self._before, self._began = self.progress.seconds, time.perf_counter()
        own = self._batches if self._processes.alone else RowShare(self._batches, self._own_rows)
        batches = load_ahead(own, self.step, self.steps)
        running: _RunningStep | None = None
        with Interrupts(self._processes) as interrupts:
            while not (self._stopping or interrupts.requested):
                number = self.step + (running is not None)
                if number >= self.steps:
                    break
                placed = self._assembled(next(batches))
                if running is not None and placed not in self._step_cache:
                    self._finish(running)  # its time is not to include the compilation
                    running = None
                # The device computes this step while the host reads the numbers of the last one.
                started = self._start(number, placed, interrupts)
                if running is not None:
                    self._finish(running)
                running = started
                if any(each.needs_state(self, number + 1) for each in self.callbacks):
                    self._finish(running)
                    running = None
            if running is not None:
                self._finish(running)
        result = self._result(interrupts.requested)
        self.notify("on_end", result)
        return result

    def evaluate(self, batches: Any, limit: int = -1) -> float:
        """Return the mean loss on batches.

        Args:
          batches: A sequence, or another iterable, of batches.
          limit: Maximum number of batches; -1 for all.

        Returns:
          The sum of the losses over the sum of the weights.
        """
        state, frozen, each = self._state.trainable, self._frozen, all_batches(batches)
        total, weight = total_loss(self._measure, state, frozen, each, limit, place=self._placed)
        release_freed_memory()  # of a compilation, before the next step
        return total / weight if weight else 0.0

    def compile(self) -> int:
        """Compile the first step without running it.

        Returns:
          Its planned memory in bytes; 0 if the platform does not report it.
        """
        batch = self._placed(self._batches.at(self.step))
        self._step_cache.compiled(self._state, self._frozen, batch)
        return self._step_cache.planned_bytes

    def save(self, *, keep: int | None = None) -> Path | None:
        """Save a checkpoint of this step, unless there is one already or no run folder.

        Args:
          keep: Number of checkpoints to keep, in addition to the best one; None: as many as the
            callback `Checkpoint` keeps, or 3 without one.

        Returns:
          The checkpoint's folder; None without a run folder.
        """
        if self._run is None:
            return None
        if keep is None:
            saving = [each.keep for each in self.callbacks if isinstance(each, Checkpoint)]
            keep = max(saving, default=3)
        path, new = self._save(self._run, keep)
        if new:
            self.notify("on_save", path)
        return path

    def _save(self, run: RunFolder, keep: int) -> tuple[Path, bool]:
        """Save as the first process; the others give it their parts, and learn what it did."""
        step, best, processes = self.step, self._best, self._processes
        record = {"ledger": self.progress.to_dict(), **self._record}
        state: Any = None
        if not processes.first(lambda: run.has(step)):
            state = processes.gathered((self._state.trainable, self._state.opt_state))

        def write(folder: Path) -> None:
            self._trainable.save(folder, state[0])
            save_state(folder, state[1], record)

        new = processes.first(lambda: run.save(step, write, best, keep=keep)[1])
        return run.path / checkpoint_name(step), new

    def describe_shape(self, batch: Any) -> str:
        """Describe a batch's shape, for messages."""
        return self._batches.describe_shape(batch)

    def _start(self, number: int, placed: Any, interrupts: Interrupts) -> _RunningStep:
        """Start a step, which runs on the device in the background."""
        new = placed not in self._step_cache
        compiled = self._step_cache.compiled(self._state, self._frozen, placed)
        if new:  # CPU processes wait only 30 s for each other in a new collective operation
            int(self._processes.start_max(0))
        began = time.perf_counter()
        self._state, report = compiled(self._state, self._frozen, placed)
        hear = functools.partial(interrupts.hear, interrupts.share())
        return _RunningStep(number, placed, report, began, hear)

    def _finish(self, running: _RunningStep) -> None:
        """Wait for a step, check and count its numbers, and call the callbacks."""
        report = running.report
        loss, weight = float(report.loss), float(report.weight)
        running.hear()
        ended = time.perf_counter()
        seconds, self._ended = ended - max(running.began, self._ended), ended
        if not math.isfinite(loss) or not math.isfinite(float(report.gradient_norm)):
            raise NonFiniteLossError(
                f"step {running.number + 1}, {self._batches.describe(running.number)}",
                got=f"loss {loss}, gradient norm {float(report.gradient_norm)}",
                expected="finite values",
                fix="Lower the learning rate, or inspect these examples. Earlier checkpoints are "
                "untouched.",
            )
        tokens = tokens_of(self._batches, running.number, running.batch, weight)
        self.progress.add_step(loss, weight, tokens, seconds)
        if self.step == self._batches.per_epoch and not self.progress.weight:
            raise DataError(
                f"the training batches, after {self.step} steps",
                got="no target token",
                expected="at least one target token",
                fix="Check the examples, or include the prompts in the loss (mask_prompt=False).",
            )
        self.progress.seconds = self._before + time.perf_counter() - self._began
        self.notify("on_step", loss)

    # -------------------------------------------------------------------------------------------
    # Start and end
    # -------------------------------------------------------------------------------------------

    def _check_steps(self, steps: int | None) -> int:
        chosen = self._batches.per_epoch if steps is None else steps
        if isinstance(chosen, int) and not isinstance(chosen, bool) and chosen >= 1:
            return chosen
        raise ConfigError(
            "Trainer: steps",
            got=repr(steps),
            expected="an integer of at least 1"
            if steps is not None
            else "an integer, because these batches have no length",
            fix="Pass, for example, steps=1000.",
        )

    def _initial(self, optimizer: optax.GradientTransformation) -> tuple[Any, TrainState, Any]:
        """Return the frozen half, the state before the first step, and its shardings."""
        frozen, start = self._trainable.frozen, self._trainable.start
        in_place, mesh = self._trainable.in_place, self._mesh
        if mesh is None:
            return frozen, init_state(start, optimizer, in_place=in_place), None
        put = self._processes.put
        frozen = put(frozen, placed_or_replicated(frozen, mesh))
        of_start = placed_or_replicated(start, mesh)
        if isinstance(start, Adapter):  # it is sharded as the base model is
            of_start = adapter_shardings(frozen, start)
        # The optimizer creates its arrays with the shardings of the parameters.
        state = init_state(put(start, of_start), optimizer, in_place=in_place)
        shardings = state_shardings(state, of_start, mesh)
        return frozen, put(state, shardings), shardings

    def _placed(self, batch: Any) -> Any:
        """Put a batch that this process has as a whole on the devices."""
        return self._assembled(take_rows(batch, self._own_rows))

    def _assembled(self, own: Any) -> Any:
        """Put the rows of this process on its devices."""
        return own if self._mesh is None else self._processes.assemble(own, self._mesh)

    def _restore(self, checkpoint: Path) -> None:
        record = read_record(checkpoint)
        self.progress = RunProgress.from_dict(record.get("ledger"), str(checkpoint))
        state = self._state._replace(
            trainable=self._trainable.load(checkpoint),
            opt_state=load_opt_state(checkpoint, record, self._state.opt_state),
            step=jnp.int32(self.progress.step),
        )
        self._state = state if self._mesh is None else self._processes.put(state, self._shardings)

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
    run: str | Path | RunFolder | None, resume: bool | str | Path, processes: ProcessGroup
) -> tuple[RunFolder | None, Path | None]:
    """Prepare the folder of a run, and find the checkpoint to continue from."""
    automatic = resume is True or resume == "auto"
    source = (run.path if isinstance(run, RunFolder) else run) if automatic else (resume or None)
    checkpoint = None if source is None else find_resumable(str(source))
    if checkpoint is None and source is not None and not automatic:
        raise ConfigError(
            f"Trainer: resume={str(resume)!r}",
            got="no run with a checkpoint there",
            expected="the folder of a run, or one of its checkpoints",
            fix='Check the path, or pass resume="auto" to start a run if there is none.',
        )
    # Only now may the first process change the folder: the others have found their checkpoint.
    name = "" if checkpoint is None else checkpoint.name
    processes.require_same({"the checkpoint to resume from": name})
    if isinstance(run, RunFolder):
        return run, checkpoint
    if checkpoint is not None and (
        run is None or checkpoint.parent.resolve() == Path(run).resolve()
    ):
        path = checkpoint.parent
        make = functools.partial(RunFolder.resume, path, checkpoint=checkpoint.name)
    elif run is not None:
        path = Path(run)
        make = functools.partial(RunFolder.prepare, path)
    else:
        return None, None
    made = [RunFolder(path)]  # of a process that writes nothing
    processes.first(lambda: made.append(make()[0]))
    return made[-1], checkpoint
