"""Fine-tune a Hugging Face model with LoRA. The default is the bundled model on its task."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_lora.cli.base_model import BUNDLED, BaseModel, data_folder, load_base, model_folder
from jax_lora.cli.resolve_config import Choice, choose
from jax_lora.cli.train_flags import add_options
from jax_lora.data.batches import Batches
from jax_lora.data.data_folder import DataSet, read_data
from jax_lora.data.examples import Examples
from jax_lora.data.packing import speedup
from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.callbacks import Callback, Checkpoint, EarlyStop, Report, Validate
from jax_lora.finetune.devices import data_mesh, use_all_cores
from jax_lora.finetune.resume import refuse_changes, stretched
from jax_lora.finetune.run_folder import RunFolder
from jax_lora.finetune.samples import Sampler
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.tasks import (
    CAUSAL,
    CLASSES,
    choose_task,
    encode_examples,
    labels_for,
    longest_input,
    loss_for,
    make_batches,
    make_trainable,
)
from jax_lora.finetune.trainable import Trainable
from jax_lora.finetune.trainer import Trainer
from jax_lora.finetune.training_state import read_record
from jax_lora.models.read_config import read_config
from jax_lora.report.events import Reporter, RunPlan, RunResult
from jax_lora.report.loss_plot import write_run_plot
from jax_lora.report.metrics import JSONL, MetricsLog
from jax_lora.report.reporters import make_reporter
from jax_lora.report.versions import write_versions

__all__ = ["HELP", "add_options", "run"]

DONE, INTERRUPTED = 0, 130
HELP = "fine-tune a model"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that a run works on, read and checked.

    Args:
      base: The model.
      data: The data set.
      train: The training examples.
      valid: The validation examples, or None.
      trainable: The frozen and the trainable half of the model.
      settings: The settings, with the length and the type that the model allows.
      places: Where the model and the data came from, for the next command.
    """

    base: BaseModel
    data: DataSet
    train: Examples
    valid: Examples | None
    trainable: Trainable
    settings: TrainSettings
    places: dict[str, str]

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes of the splits."""
        return {name: self.data.split(name).digest for name in self.data.splits if name != "test"}

    def batches(self, examples: Examples, seed: int = 0) -> Batches:
        """Make batches of examples."""
        settings, base = self.settings, self.base
        rows = settings.batch_size * settings.grad_accumulation_steps
        pack = settings.max_seq_length if settings.pack else None
        options = {"seed": seed, "pack": pack}
        return make_batches(base.task, examples, base.model, base.tokenizer, rows, **options)


Log = Callable[[dict[str, Any]], None]


def run(options: argparse.Namespace) -> int:
    """Train, and return the exit code."""
    choice = choose(options)
    use_all_cores()
    reporter = make_reporter(choice.progress)
    inputs = _read(choice)
    record = None if choice.checkpoint is None else read_record(choice.checkpoint)
    if record is not None:
        refuse_changes(record, inputs.settings, inputs.digests)
    if options.dry_run:
        return _rehearse(inputs, reporter)
    folder, notes = _folder(choice, inputs)
    metrics = MetricsLog(
        folder.path,
        tensorboard="tensorboard" in inputs.settings.log,
        resume_at=_steps_done(record),
    )
    try:
        trainer = _trainer(inputs, reporter, folder, choice.checkpoint, metrics.log)
        if record is not None and choice.checkpoint is not None:
            longer = stretched(record, inputs.settings)
            notes += _resumed(choice.checkpoint, trainer.step, trainer.steps, longer)
        reporter.planned(_plan(inputs, trainer.steps, notes))
        result = trainer.train()
    finally:
        metrics.close()
        _draw(folder.path)
    return _farewell(inputs, folder, result, choice.progress)


def _steps_done(record: dict[str, Any] | None) -> int:
    ledger = {} if record is None else record.get("ledger")
    step = ledger.get("step") if isinstance(ledger, dict) else 0
    return step if isinstance(step, int) else 0


def _draw(run: Path) -> None:
    """Draw what there is; a picture is not worth the end of a run without its package."""
    if importlib.util.find_spec("matplotlib") and (run / JSONL).stat().st_size:
        write_run_plot(run)


def _farewell(inputs: Inputs, folder: RunFolder, result: RunResult, progress: str) -> int:
    """Say what to type next, unless a program is listening."""
    say = print if progress not in ("json", "none") else _say_nothing
    if result.interrupted:
        say(f"{result.interrupted}: stopped after {result.steps} steps; all of them are saved.")
        say(f"Go on: jax-lora train --resume {folder.path}")
        return INTERRUPTED
    say(f"Next: {_next(inputs, folder, result)}")
    return DONE


def _say_nothing(text: str) -> None:
    """Leave standard output to the reports."""


def _read(choice: Choice) -> Inputs:
    data = read_data(data_folder(choice.data))
    train = data.split("train")  # before a model is loaded
    settings, folder = choice.settings, model_folder(choice.model)
    config = read_config(folder)
    task = choose_task(settings.task, config, train)
    labels = labels_for(config, settings.labels, train) if task == CLASSES else ()
    _check_task(task, settings)
    base = load_base(
        choice.model,
        settings.dtype,
        remat=settings.grad_checkpoint,
        task=task,
        labels=labels,
        seed=settings.seed,
    )
    # An adapter belongs to a base of this type, so the type is stored and not chosen again.
    settings = dataclasses.replace(
        settings,
        max_seq_length=min(settings.max_seq_length, longest_input(base.model)),
        dtype=base.dtype,
        task=task,
        labels=labels,
    )
    trainable = make_trainable(
        task, base.model, base.variables, settings, start=base.start, folder=folder
    )
    return Inputs(
        base=base,
        data=data,
        train=_examples(data, "train", base, settings),
        valid=_examples(data, "valid", base, settings) if "valid" in data.splits else None,
        trainable=trainable,
        settings=settings,
        places={"model": _place(choice.model), "data": _place(choice.data)},
    )


def _check_task(task: str, settings: TrainSettings) -> None:
    """Refuse options that only decoders have."""
    if task == CAUSAL:
        return
    for flag, given in (("--pack", settings.pack), ("--sample-prompt", settings.sample_prompt)):
        if given:
            raise ConfigError(
                format_error(
                    flag,
                    got=f"the task {task}",
                    expected="the task causal-lm, of decoders",
                    fix=f"Leave {flag} out.",
                )
            )


def _place(name: str | None) -> str:
    """Name a place such that another command finds it from anywhere."""
    return BUNDLED if name in (None, BUNDLED) else str(Path(name).resolve())


def _examples(data: DataSet, split: str, base: BaseModel, settings: TrainSettings) -> Examples:
    return encode_examples(base.task, data.split(split), base.model, base.tokenizer, settings)


def _folder(choice: Choice, inputs: Inputs) -> tuple[RunFolder, list[str]]:
    """Make the run's folder, or open that of the run to resume."""
    if choice.checkpoint is not None:
        folder, moved = RunFolder.resume(choice.run, checkpoint=choice.checkpoint.name)
        notes = [f"checkpoints after {choice.checkpoint.name} are now in {moved}"] if moved else []
    else:
        folder, moved = RunFolder.prepare(choice.run)
        notes = [f"the run that was in {folder.path} is now in {moved}"] if moved else []
    folder.write_config(inputs.places | inputs.settings.as_dict())
    write_versions(folder.path)
    return folder, notes


def _trainer(
    inputs: Inputs,
    reporter: Reporter,
    folder: RunFolder | None = None,
    checkpoint: Path | None = None,
    log: Log | None = None,
) -> Trainer:
    settings, base = inputs.settings, inputs.base
    batches = inputs.batches(inputs.train, settings.seed)
    steps = settings.iterations(batches.per_epoch)
    halves = inputs.trainable.frozen, inputs.trainable.start
    return Trainer(
        loss_for(base.task, base.model, chunk=settings.loss_chunk),
        base.variables,
        inputs.trainable,
        settings.make_optimizer(steps),
        batches,
        steps=steps,
        run=folder,
        resume=checkpoint or False,
        callbacks=_callbacks(inputs, reporter, steps, log),
        accumulation=settings.grad_accumulation_steps,
        seed=settings.seed,
        mesh=data_mesh(settings.batch_size, halves),
        record={"settings": settings.as_dict(), "data": inputs.digests},
    )


def _callbacks(inputs: Inputs, reporter: Reporter, steps: int, log: Log | None) -> list[Callback]:
    """Say what happens between steps: first the report, then the validation, then the rest."""
    settings, base = inputs.settings, inputs.base
    rate = settings.make_schedule(steps)
    report = Report(settings.steps_per_report, reporter=reporter, log=log, schedule=rate)
    callbacks: list[Callback] = [report]
    if inputs.valid is not None:
        prompts = settings.sample_prompt
        samples = Sampler(base.model, base.tokenizer, prompts).answers if prompts else None
        valid, limit = inputs.batches(inputs.valid), settings.val_batches
        callbacks.append(Validate(valid, settings.steps_per_eval, limit=limit, samples=samples))
    if settings.early_stop is not None:
        callbacks.append(EarlyStop(settings.early_stop))
    saving = Checkpoint(settings.save_every, keep=settings.keep, save_best=settings.save_best)
    return [*callbacks, saving]


def _rehearse(inputs: Inputs, reporter: Reporter) -> int:
    """Do everything but train, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(inputs, reporter, RunFolder(Path(scratch)))
        notes = ["a dry run: nothing is trained or written"]
        reporter.planned(_plan(inputs, trainer.steps, notes))
        needed = trainer.compile()
    print(f"Dry run: the first step compiles, and needs {needed / 1e9:.2f} GB.")
    return DONE


def _plan(inputs: Inputs, steps: int, notes: list[str]) -> RunPlan:
    return RunPlan(
        model=f"{inputs.base.name}, {inputs.base.size:,} parameters",
        adapter=_describe(inputs),
        data=f"{inputs.data.path}: {_counts(inputs.train, inputs.valid)}",
        steps=steps,
        notes=(*notes, *_notes(inputs)),
        hints=tuple(_hints(inputs)),
    )


def _hints(inputs: Inputs) -> list[str]:
    """What could be done better, as far as it can be seen before the first step."""
    settings, hints = inputs.settings, []
    lengths = [example.tokens for example in inputs.train.rows]
    if inputs.base.task == CAUSAL and not settings.pack:
        padding = Batches.of(inputs.train.rows, 1).padding
        gain = speedup(lengths, round(sum(lengths) / (1 - padding)), settings.max_seq_length)
        if gain > 1.3:
            hints.append(f"rows are {padding:.0%} padding: --pack would be {gain:.1f}x faster")
    if settings.fine_tune_type == "full" and inputs.base.dtype != "float32":
        hints.append(f"small updates are lost in {inputs.base.dtype}: --dtype float32 keeps them")
    return hints


def _describe(inputs: Inputs) -> str:
    settings, trained, size = inputs.settings, inputs.trainable, inputs.base.size
    share = f"{trained.size:,} trainable parameters ({trained.size / size:.2%})"
    if settings.fine_tune_type == "full":
        return f"none, full fine-tuning: {share}"
    config = trained.start.config
    kind = "DoRA of rank" if config.use_dora else "rank"
    kernels = len(trained.start.pairs)
    return f"{kind} {config.rank}, alpha {config.alpha:g}, {kernels} kernels, {share}"


def _counts(train: Examples, valid: Examples | None) -> str:
    tokens = sum(example.tokens for example in train.rows)
    held_out = f", {len(valid.rows)} valid" if valid is not None else ", no validation rows"
    return f"{len(train.rows)} train{held_out}; {tokens:,} tokens an epoch"


def _notes(inputs: Inputs) -> list[str]:
    notes, train, rows = [], inputs.train, inputs.data.split("train")
    if rows.blank:
        notes.append(f"{len(rows.rows)} rows read + 0 refused + {rows.blank} blank lines skipped")
    if rows.skipped:
        notes.append(f"{rows.skipped} files skipped: binary, empty, too large, or links")
    if train.pieces:
        notes.append(f"documents longer than a row are cut into {train.pieces} pieces")
    if train.cut:
        notes.append(f"{train.cut} rows are cut at the longest length")
    if train.unlocated:
        notes.append(
            f"{train.unlocated} answers are not learned: the chat template writes them differently"
        )
    if train.dropped:
        lines = ", ".join(map(str, train.dropped[:10]))
        notes.append(f"{len(train.dropped)} rows left out, nothing to learn: lines {lines}")
    if inputs.settings.early_stop is not None and inputs.valid is None:
        notes.append("--early-stop has no effect: there are no validation rows")
    return notes


def _resumed(checkpoint: Path, done: int, steps: int, stretched: bool) -> list[str]:
    notes = [f"resumed from {checkpoint}: {done} of {steps} steps are done"]
    if done >= steps:
        notes.append("nothing is left to do: raise --iters or --epochs to go on")
    if stretched:
        notes.append("the run has another length than before, and so another learning rate")
    return notes


def _next(inputs: Inputs, folder: RunFolder, result: RunResult) -> str:
    if inputs.settings.fine_tune_type == "full":
        return f"jax-lora generate {result.checkpoint} --prompt TEXT"
    return f"jax-lora eval --adapter-path {folder.path} --compare-base"
