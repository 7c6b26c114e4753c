"""Fine-tune a Hugging Face model with LoRA. Without arguments: the bundled model and task."""

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
from jax_lora.data.examples import Examples, make_examples
from jax_lora.data.packing import speedup
from jax_lora.finetune.devices import use_all_cores
from jax_lora.finetune.loop import TrainLoop
from jax_lora.finetune.resume import refuse_changes, stretched
from jax_lora.finetune.run_folder import RunFolder
from jax_lora.finetune.samples import Sampler
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.trainable import Trainable, make_trainable
from jax_lora.finetune.training_state import read_record
from jax_lora.report.events import Reporter, RunPlan, RunResult
from jax_lora.report.loss_plot import write_run_plot
from jax_lora.report.metrics import JSONL, MetricsLog
from jax_lora.report.reporters import make_reporter
from jax_lora.report.versions import write_versions

__all__ = ["HELP", "add_options", "run"]

DONE, INTERRUPTED = 0, 130
HELP = "fine-tune a model; with no arguments, the bundled one on the bundled task"


@dataclasses.dataclass(frozen=True)
class Ready:
    """All that a run works on, read and checked.

    Args:
      base: The model.
      data: All rows.
      train: The rows to learn.
      valid: The rows to measure, or None.
      trainable: What is trained.
      settings: What to do; the length and the type are those that the model allows.
      places: Where the model and the rows came from, for the next command.
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
        """Name the content of the splits."""
        return {name: self.data.split(name).digest for name in self.data.splits if name != "test"}


Log = Callable[[dict[str, Any]], None]


def _silent(values: dict[str, Any]) -> None:
    """Log nothing."""


def run(options: argparse.Namespace) -> int:
    """Train, and return the exit code."""
    choice = choose(options)
    use_all_cores()
    reporter = make_reporter(choice.progress)
    ready = _read(choice)
    record = None if choice.checkpoint is None else read_record(choice.checkpoint)
    if record is not None:
        refuse_changes(record, ready.settings, ready.digests)
    if options.dry_run:
        return _rehearse(ready, reporter)
    folder, notes = _folder(choice, ready)
    metrics = MetricsLog(
        folder.path,
        tensorboard="tensorboard" in ready.settings.log,
        resume_at=_steps_done(record),
    )
    loop = _loop(ready, folder, reporter, metrics.log)
    if record is not None and choice.checkpoint is not None:
        done = loop.resume(choice.checkpoint, record)
        notes += _resumed(choice.checkpoint, done, loop.steps, stretched(record, ready.settings))
    reporter.planned(_plan(ready, loop.steps, notes))
    try:
        result = loop.train()
    finally:
        metrics.close()
        _draw(folder.path)
    return _farewell(ready, folder, result, choice.progress)


def _steps_done(record: dict[str, Any] | None) -> int:
    ledger = {} if record is None else record.get("ledger")
    step = ledger.get("step") if isinstance(ledger, dict) else 0
    return step if isinstance(step, int) else 0


def _draw(run: Path) -> None:
    """Draw what there is; a picture is not worth the end of a run without its package."""
    if importlib.util.find_spec("matplotlib") and (run / JSONL).stat().st_size:
        write_run_plot(run)


def _farewell(ready: Ready, folder: RunFolder, result: RunResult, progress: str) -> int:
    """Say what to type next, unless a program is listening."""
    say = print if progress not in ("json", "none") else _say_nothing
    if result.interrupted:
        say(f"{result.interrupted}: stopped after {result.steps} steps; all of them are saved.")
        say(f"Go on: jax-lora train --resume {folder.path}")
        return INTERRUPTED
    say(f"Next: {_next(ready, folder, result)}")
    return DONE


def _say_nothing(text: str) -> None:
    """Leave standard output to the reports."""


def _read(choice: Choice) -> Ready:
    data = read_data(data_folder(choice.data))
    data.split("train")  # before a model is loaded
    settings = choice.settings
    base = load_base(choice.model, settings.dtype, remat=settings.grad_checkpoint)
    longest = min(settings.max_seq_length, base.model.config.max_position_embeddings)
    # What is trained belongs to a base of this type, so the type is kept and not chosen again.
    settings = dataclasses.replace(settings, max_seq_length=longest, dtype=base.dtype)
    folder = model_folder(choice.model)
    return Ready(
        base=base,
        data=data,
        train=_examples(data, "train", base, settings),
        valid=_examples(data, "valid", base, settings) if "valid" in data.splits else None,
        trainable=make_trainable(base.model, base.variables, settings, folder=folder),
        settings=settings,
        places={"model": _place(choice.model), "data": _place(choice.data)},
    )


def _place(name: str | None) -> str:
    """Name a place such that another command finds it from anywhere."""
    return BUNDLED if name in (None, BUNDLED) else str(Path(name).resolve())


def _examples(data: DataSet, split: str, base: BaseModel, settings: TrainSettings) -> Examples:
    return make_examples(
        data.split(split),
        base.tokenizer,
        max_length=settings.max_seq_length,
        truncate=settings.truncate,
        mask_prompt=settings.mask_prompt,
        turns=settings.turns,
    )


def _folder(choice: Choice, ready: Ready) -> tuple[RunFolder, list[str]]:
    """Make the run's folder, or take an earlier run's up again."""
    keep = ready.settings.keep
    if choice.checkpoint is not None:
        folder, moved = RunFolder.resume(choice.run, keep=keep, checkpoint=choice.checkpoint.name)
        notes = [f"checkpoints after {choice.checkpoint.name} are now in {moved}"] if moved else []
    else:
        folder, moved = RunFolder.prepare(choice.run, keep=keep)
        notes = [f"the run that was in {folder.path} is now in {moved}"] if moved else []
    folder.write_config(ready.places | ready.settings.as_dict())
    write_versions(folder.path)
    return folder, notes


def _loop(ready: Ready, folder: RunFolder, reporter: Reporter, log: Log = _silent) -> TrainLoop:
    settings = ready.settings
    rows = settings.batch_size * settings.grad_accumulation_steps
    pack = settings.max_seq_length if settings.pack else None
    valid = None if ready.valid is None else Batches.of(ready.valid.rows, rows, pack=pack)
    return TrainLoop(
        ready.base.model,
        ready.trainable,
        settings,
        batches=Batches.of(ready.train.rows, rows, seed=settings.seed, pack=pack),
        validation=valid,
        run=folder,
        reporter=reporter,
        log=log,
        sampler=Sampler(ready.base.model, ready.base.tokenizer, settings.sample_prompt),
        facts={"data": ready.digests},
    )


def _rehearse(ready: Ready, reporter: Reporter) -> int:
    """Do everything but train, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        loop = _loop(ready, RunFolder(Path(scratch)), reporter)
        reporter.planned(_plan(ready, loop.steps, ["a dry run: nothing is trained or written"]))
        needed = loop.compile()
    print(f"Dry run: the first step compiles, and needs {needed / 1e9:.2f} GB.")
    return DONE


def _plan(ready: Ready, steps: int, notes: list[str]) -> RunPlan:
    return RunPlan(
        model=f"{ready.base.name}, {ready.base.size:,} parameters",
        adapter=_describe(ready),
        data=f"{ready.data.path}: {_counts(ready.train, ready.valid)}",
        steps=steps,
        notes=(*notes, *_notes(ready)),
        hints=tuple(_hints(ready)),
    )


def _hints(ready: Ready) -> list[str]:
    """What could be done better, as far as it can be seen before the first step."""
    settings, hints = ready.settings, []
    lengths = [len(example.ids) for example in ready.train.rows]
    padding = Batches.of(ready.train.rows, 1).padding
    gain = speedup(lengths, round(sum(lengths) / (1 - padding)), settings.max_seq_length)
    if not settings.pack and gain > 1.3:
        hints.append(f"rows are {padding:.0%} padding: --pack would be {gain:.1f}x faster")
    if settings.fine_tune_type == "full" and ready.base.dtype != "float32":
        hints.append(f"small updates are lost in {ready.base.dtype}: --dtype float32 keeps them")
    return hints


def _describe(ready: Ready) -> str:
    settings, trained, size = ready.settings, ready.trainable, ready.base.size
    share = f"{trained.size:,} trainable parameters ({trained.size / size:.2%})"
    if settings.fine_tune_type == "full":
        return f"none, full fine-tuning: {share}"
    config = trained.start.config
    kind = "DoRA of rank" if config.use_dora else "rank"
    kernels = len(trained.start.pairs)
    return f"{kind} {config.rank}, alpha {config.alpha:g}, {kernels} kernels, {share}"


def _counts(train: Examples, valid: Examples | None) -> str:
    tokens = sum(len(example.ids) for example in train.rows)
    held_out = f", {len(valid.rows)} valid" if valid is not None else ", no validation rows"
    return f"{len(train.rows)} train{held_out}; {tokens:,} tokens an epoch"


def _notes(ready: Ready) -> list[str]:
    notes, train, rows = [], ready.train, ready.data.split("train")
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
    if ready.settings.early_stop is not None and ready.valid is None:
        notes.append("--early-stop has no effect: there are no validation rows")
    return notes


def _resumed(checkpoint: Path, done: int, steps: int, stretched: bool) -> list[str]:
    notes = [f"resumed from {checkpoint}: {done} of {steps} steps are done"]
    if done >= steps:
        notes.append("nothing is left to do: raise --iters or --epochs to go on")
    if stretched:
        notes.append("the run has another length than before, and so another learning rate")
    return notes


def _next(ready: Ready, folder: RunFolder, result: RunResult) -> str:
    if ready.settings.fine_tune_type == "full":
        return f"jax-lora generate {result.checkpoint} --prompt TEXT"
    return f"jax-lora eval --adapter-path {folder.path} --compare-base"
