"""Fine-tune a Hugging Face model with LoRA; by default, the bundled model on its task."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jax_lora
from jax_lora.adapter import LoraPair
from jax_lora.checkpoint.fingerprint import fingerprint
from jax_lora.cli.base_model import BUNDLED, BaseModel, data_folder, load_base, model_folder
from jax_lora.cli.distributed import joined
from jax_lora.cli.resolve_config import Choice, choose
from jax_lora.cli.train_flags import add_options
from jax_lora.data.batches import Batches
from jax_lora.data.columns import renaming
from jax_lora.data.data_folder import DataSet, read_data
from jax_lora.data.examples import Examples
from jax_lora.data.packing import speedup
from jax_lora.data.template_files import choose_template
from jax_lora.errors import ConfigError, LoraError
from jax_lora.finetune.callbacks import Callback, Checkpoint, EarlyStop, Report, Validate
from jax_lora.finetune.devices import data_mesh, make_mesh, use_all_cores
from jax_lora.finetune.memory import device_memory
from jax_lora.finetune.process_group import ProcessGroup, process_group
from jax_lora.finetune.resume import refuse_changes, stretched
from jax_lora.finetune.run_folder import RunFolder, claimed
from jax_lora.finetune.run_template import write_run_template
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
from jax_lora.finetune.training_state import read_record, steps_done
from jax_lora.models.mesh_sharding import DATA
from jax_lora.models.read_config import read_config
from jax_lora.plan.compiled_step import fit_remat
from jax_lora.plan.planned_model import plan_config
from jax_lora.report.events import Reporter, RunPlan, RunResult
from jax_lora.report.loss_plot import write_run_plot
from jax_lora.report.metrics import MetricsLog
from jax_lora.report.reporters import make_reporter
from jax_lora.report.versions import write_versions
from jax_lora.report.wandb_log import import_wandb
from jax_lora.storage.locks import FolderLock
from jax_lora.transform.strategies import target_platform

__all__ = ["EXAMPLE", "HELP", "add_options", "run"]

DONE, INTERRUPTED = 0, 130
HELP = "fine-tune a model"
EXAMPLE = """\
jax-lora train --epochs 3 --rank 8
jax-lora train model --data data --adapter-path run
jax-lora train model --data qa.csv --columns prompt=question,completion=answer
jax-lora train model --data qa.csv --prompt-template 'Q: {prompt}\\nA:'
jax-lora train model --data chats.jsonl --chat-template tool_use
"""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a run, loaded and checked.

    Args:
      base: The base model.
      data: The data set.
      train: The training examples.
      valid: The validation examples, or None.
      trainable: The frozen and the trainable half of the model.
      settings: The settings, with the sequence length, dtype, task and labels of the model.
      places: Paths of the model and the data, for config.yaml.
      mesh: The devices.
    """

    base: BaseModel
    data: DataSet
    train: Examples
    valid: Examples | None
    trainable: Trainable
    settings: TrainSettings
    places: dict[str, str]
    mesh: Mesh

    @property
    def digests(self) -> dict[str, str]:
        """Return a hash for each split except test."""
        return {name: self.data.split(name).digest for name in self.data.splits if name != "test"}

    def batches(self, examples: Examples, seed: int = 0) -> Batches:
        """Create batches of examples."""
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
    with joined(options.distributed), contextlib.ExitStack() as stack:
        processes = process_group()
        if not processes.writes:
            choice = dataclasses.replace(choice, progress="none")  # the first process reports
        if options.dry_run:
            return _dry_run(_inputs(choice, processes)[0], choice.progress, processes.writes)
        locks: list[FolderLock] = []  # before anything is loaded or compiled
        processes.first(lambda: locks.append(stack.enter_context(claimed(choice.run))))
        return _train(choice, processes, locks)


def _inputs(choice: Choice, processes: ProcessGroup) -> tuple[Inputs, dict[str, Any] | None]:
    """Read the inputs of a run, and the record of the run to resume."""
    record = None if choice.checkpoint is None else read_record(choice.checkpoint)
    inputs = _read(choice)
    if not processes.alone:
        processes.require_same(_identity(inputs, record))
    if record is not None:
        refuse_changes(record, inputs.settings, inputs.digests, inputs.base.identity)
    return inputs, record


def _identity(inputs: Inputs, record: dict[str, Any] | None) -> dict[str, str]:
    """Return what must be equal in all processes, by the name for a message."""
    base = inputs.base
    return {
        "the command's options": repr(dataclasses.replace(inputs.settings, chat_template=None)),
        "the training and validation data": repr(inputs.digests),
        "the tokenizer": repr(base.identity),
        "the base model": repr((base.model.config, fingerprint(base.variables))),
        "the memory of the devices": repr(base.model.remat),
        "the checkpoint to resume from": repr(record),
        "the installed versions": repr((jax_lora.__version__, jax.__version__)),
    }


def _train(choice: Choice, processes: ProcessGroup, locks: list[FolderLock]) -> int:
    reporter = make_reporter(choice.progress)
    if processes.writes and "wandb" in choice.settings.log:
        import_wandb()  # before anything is loaded or moved
    inputs, record = _inputs(choice, processes)
    folders = [RunFolder(Path(choice.run))]  # of a process that writes nothing

    def prepare() -> list[str]:
        folder, notes = _folder(choice, inputs, *locks)
        folders.append(folder)
        return notes

    notes: list[str] = processes.first(prepare)
    folder = folders[-1]
    metrics = _metrics(folder, inputs, record) if processes.writes else None
    log = None if metrics is None else metrics.log
    try:
        trainer = _trainer(inputs, reporter, folder, choice.checkpoint, log)
        if record is not None and choice.checkpoint is not None:
            longer = stretched(record, inputs.settings)
            notes += _resumed(choice.checkpoint, trainer.step, trainer.steps, longer)
        reporter.planned(_plan(inputs, trainer.steps, notes))
        result = trainer.train()
    finally:
        if metrics is not None:
            metrics.close()
            _write_plot(folder.path)
    return _print_next(inputs, folder, result, choice.progress)


def _metrics(folder: RunFolder, inputs: Inputs, record: dict[str, Any] | None) -> MetricsLog:
    settings, step = inputs.settings, 0 if record is None else steps_done(record)
    return MetricsLog(
        folder.path,
        tensorboard="tensorboard" in settings.log,
        wandb=settings.as_dict() if "wandb" in settings.log else None,
        resume_at=step if isinstance(step, int) else 0,
    )


def _write_plot(run: Path) -> None:
    """Plot the loss, if matplotlib is installed: a missing plot must not end a run."""
    if importlib.util.find_spec("matplotlib"):
        with contextlib.suppress(LoraError):
            write_run_plot(run)


def _print_next(inputs: Inputs, folder: RunFolder, result: RunResult, progress: str) -> int:
    """Print the next command, unless the output is for a program; return the exit code."""
    if result.interrupted:
        lines = [
            f"{result.interrupted}: stopped after {result.steps} steps; all of them are saved.",
            f"Resume: jax-lora train --resume {shlex.quote(str(folder.path))}",
        ]
    else:
        verb = f"eval --adapter-path {shlex.quote(str(folder.path))} --compare-base"
        if inputs.settings.fine_tune_type == "full":
            verb = f"generate {shlex.quote(str(result.checkpoint))} --prompt TEXT"
        lines = [f"Next: jax-lora {verb}"]
    if progress not in ("json", "none"):
        print("\n".join(lines))
    return INTERRUPTED if result.interrupted else DONE


def _read(choice: Choice) -> Inputs:
    settings, folder = choice.settings, model_folder(choice.model)
    with renaming(settings.columns):
        data = read_data(data_folder(_named_data(choice)))
    train = data.split("train")  # before a model is loaded
    chat_template = choice.chat_template
    if settings.chat_template is not None and chat_template is None:
        chat_template = choose_template(folder, settings.chat_template)
    config = read_config(folder)
    task = choose_task(settings.task, config, train)
    labels = labels_for(config, settings.labels, train) if task == CLASSES else ()
    _check_task(task, settings)
    mesh = make_mesh(settings.mesh, settings.batch_size)
    _check_samples(settings, mesh)
    base = load_base(
        choice.model,
        settings.dtype,
        remat=settings.remat_on(target_platform(())),
        attention=settings.attention,
        quantize=settings.quantize,
        task=task,
        labels=labels,
        seed=settings.seed,
        templates={"chat_template": chat_template, "prompt_template": settings.prompt_template},
        mesh=mesh,
        progress=choice.progress,
    )
    # The resolved dtype is stored, because the checkpoint is only valid for a base of this dtype.
    settings = dataclasses.replace(
        settings,
        max_seq_length=min(settings.max_seq_length, longest_input(base.model)),
        dtype=base.dtype,
        task=task,
        labels=labels,
    )
    trainable = make_trainable(
        task,
        base.model,
        base.variables,
        settings,
        start=base.start,
        folder=folder,
        chat_template=chat_template,
        mesh=mesh,
    )
    # An absolute path is valid in any working directory.
    place = BUNDLED if choice.data in (None, BUNDLED) else str(Path(choice.data).resolve())
    inputs = Inputs(
        base=base,
        data=data,
        train=_examples(data, "train", base, settings),
        valid=_examples(data, "valid", base, settings) if "valid" in data.splits else None,
        trainable=trainable,
        settings=settings,
        places={"model": base.place, "data": place},
        mesh=mesh or data_mesh(settings.batch_size, (trainable.frozen, trainable.start)),
    )
    return _with_fitting_remat(inputs)


def _named_data(choice: Choice) -> str | None:
    """Return the name of the data; another model than the bundled one has no default."""
    if choice.data is None and choice.model not in (None, BUNDLED):
        raise ConfigError(
            f"train {choice.model}",
            got="no --data",
            expected="the data to train this model on",
            fix="Add --data PATH, or --data bundled for the bundled text-to-SQL task.",
        )
    return choice.data


def _with_fitting_remat(inputs: Inputs) -> Inputs:
    """Recompute whole layers if the step does not fit into the memory of an accelerator."""
    settings, base, memory = inputs.settings, inputs.base, device_memory()
    if not settings.fits_remat or memory is None or base.task != CAUSAL:
        return inputs
    examples = inputs.train.rows
    length = settings.max_seq_length
    if not settings.pack:
        length = min(length, max(len(example.ids) for example in examples))
    remat = fit_remat(
        plan_config(base.model.config, base.dtype, base.name),
        settings,
        memory,
        length=length,
        targets=min(length, max(example.targets for example in examples)),
    )
    return dataclasses.replace(
        inputs, base=dataclasses.replace(base, model=base.model.clone(remat=remat))
    )


def _check_task(task: str, settings: TrainSettings) -> None:
    """Refuse options that only decoders support."""
    if task == CAUSAL:
        return
    for flag, given in (("--pack", settings.pack), ("--sample-prompt", settings.sample_prompt)):
        if given:
            raise ConfigError(
                flag, got=f"the task {task}", expected=f"the task {CAUSAL}", fix=f"Remove {flag}."
            )


def _check_samples(settings: TrainSettings, mesh: Mesh | None) -> None:
    """Refuse samples of a model that no process has as a whole."""
    if mesh is None or not settings.sample_prompt or process_group().alone:
        return
    sharded = [f"{name}={size}" for name, size in mesh.shape.items() if name != DATA and size > 1]
    if sharded:
        raise ConfigError(
            "--sample-prompt with several processes",
            got=f"the mesh {settings.mesh!r}, which shards the model over {sharded[0]}",
            expected="a mesh with data alone: the first process completes the prompts",
            fix="Remove --sample-prompt, or use jax-lora generate after the run.",
        )


def _examples(data: DataSet, split: str, base: BaseModel, settings: TrainSettings) -> Examples:
    return encode_examples(base.task, data.split(split), base.model, base.tokenizer, settings)


def _folder(choice: Choice, inputs: Inputs, lock: FolderLock) -> tuple[RunFolder, list[str]]:
    """Create the run's folder, or open the folder of a resumed run."""
    if choice.checkpoint is not None:
        name = choice.checkpoint.name
        folder, moved = RunFolder.resume(choice.run, checkpoint=name, lock=lock)
        notes = [f"checkpoints after {choice.checkpoint.name} are now in {moved}"] if moved else []
    else:
        folder, moved = RunFolder.prepare(choice.run, lock)
        notes = [f"the earlier run in {folder.path} is now in {moved}"] if moved else []
    folder.write_config(inputs.places | inputs.settings.as_dict())
    chosen = getattr(inputs.base.tokenizer, "chosen_template", None)
    if chosen is not None:
        write_run_template(folder.path, chosen)
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
    mesh = inputs.mesh
    return Trainer(
        loss_for(
            base.task, base.model.clone(mesh=mesh), chunk=settings.loss_chunk, devices=mesh.size
        ),
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
        mesh=mesh,
        record={
            "settings": settings.as_dict(),
            "data": inputs.digests,
            "text": inputs.base.identity,
            "places": inputs.places,
        },
    )


def _callbacks(inputs: Inputs, reporter: Reporter, steps: int, log: Log | None) -> list[Callback]:
    """Create the callbacks, in the order in which they are called: the report comes first."""
    settings = inputs.settings
    rate = settings.make_schedule(steps)
    report = Report(settings.steps_per_report, reporter=reporter, log=log, schedule=rate)
    callbacks: list[Callback] = [report]
    if inputs.valid is not None:
        samples = _samples(inputs) if settings.sample_prompt else None
        valid, limit = inputs.batches(inputs.valid), settings.val_batches
        callbacks.append(Validate(valid, settings.steps_per_eval, limit=limit, samples=samples))
    if settings.early_stop is not None:
        callbacks.append(EarlyStop(settings.early_stop))
    saving = Checkpoint(settings.save_every, keep=settings.keep, save_best=settings.save_best)
    return [*callbacks, saving]


def _samples(inputs: Inputs) -> Callable[[Any], tuple[tuple[str, str], ...]]:
    """Complete the prompts, in the first process with its copy of the model."""
    base, processes = inputs.base, process_group()
    sampler = Sampler(base.model, base.tokenizer, inputs.settings.sample_prompt)

    def answers(variables: Any) -> tuple[tuple[str, str], ...]:
        return sampler.answers(processes.own_copy(variables)) if processes.writes else ()

    return answers


def _dry_run(inputs: Inputs, progress: str, shown: bool) -> int:
    """Do everything except training, in a temporary folder."""
    reporter = make_reporter(progress)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(inputs, reporter, RunFolder(Path(scratch)))
        notes = ["dry run: nothing is trained or written"]
        reporter.planned(_plan(inputs, trainer.steps, notes))
        needed = trainer.compile()
    if shown:
        print(f"Dry run: the first step compiles; its peak memory is {needed / 1e9:.2f} GB.")
    return DONE


def _plan(inputs: Inputs, steps: int, notes: list[str]) -> RunPlan:
    train, valid = inputs.train.rows, inputs.valid
    tokens = sum(example.tokens for example in train)
    held_out = "no validation split" if valid is None else f"{len(valid.rows):,} valid"
    counts = f"{len(train):,} train, {held_out}"
    return RunPlan(
        model=f"{inputs.base.name}, {inputs.base.size:,} parameters",
        adapter=_describe(inputs),
        data=f"{inputs.data.path}: {counts}; {tokens:,} tokens per epoch",
        steps=steps,
        notes=(*notes, *_notes(inputs)),
        hints=tuple(_hints(inputs)),
    )


def _hints(inputs: Inputs) -> list[str]:
    """Suggest better settings, as far as they are known before the first step."""
    settings, hints = inputs.settings, []
    lengths = [example.tokens for example in inputs.train.rows]
    if inputs.base.task == CAUSAL and not settings.pack:
        padding = Batches.of(inputs.train.rows, 1).padding
        gain = speedup(lengths, round(sum(lengths) / (1 - padding)), settings.max_seq_length)
        if gain > 1.3:
            hints.append(f"{padding:.0%} of the tokens are padding: --pack is {gain:.1f}x faster")
    if settings.fine_tune_type == "full" and inputs.base.dtype != "float32":
        hints.append(f"{inputs.base.dtype} rounds small updates away: use --dtype float32")
    return hints


def _describe(inputs: Inputs) -> str:
    settings, trained, size = inputs.settings, inputs.trainable, inputs.base.size
    share = f"{trained.size:,} trainable parameters ({trained.size / size:.2%})"
    if settings.fine_tune_type == "full":
        return f"none, full fine-tuning: {share}"
    config = trained.start.config
    kind = "DoRA of rank" if config.use_dora else "rank"
    kernels = sum(map(_kernels, trained.start.pairs.values()))
    return f"{kind} {config.rank}, alpha {config.alpha:g}, {kernels} adapted kernels, {share}"


def _kernels(pair: LoraPair) -> int:
    """Count the kernels of a stack that have an update."""
    stack = pair.a.shape[: len(pair.stack_axes)]
    return math.prod(stack) if pair.ranks is None else int(np.count_nonzero(pair.ranks))


def _notes(inputs: Inputs) -> list[str]:
    notes, settings, train = [], inputs.settings, inputs.train
    rows = inputs.data.split("train")
    if rows.blank:
        notes.append(f"{rows.blank} blank lines skipped")
    if rows.skipped:
        notes.append(f"{rows.skipped} files skipped: binary, empty, too large, or links")
    if train.pieces:
        notes.append(f"long documents are split into {train.pieces} pieces")
    if train.cut:
        notes.append(f"{train.cut} examples are truncated at {settings.max_seq_length} tokens")
    if train.unlocated:
        notes.append(
            f"{train.unlocated} responses have no loss: the chat template changes their text"
        )
    if train.dropped:
        lines = ", ".join(map(str, train.dropped[:10]))
        notes.append(
            f"{len(train.dropped)} examples without a target token are dropped: lines {lines}"
        )
    if settings.early_stop is not None and inputs.valid is None:
        notes.append("--early-stop has no effect without a validation split")
    return notes


def _resumed(checkpoint: Path, done: int, steps: int, stretched: bool) -> list[str]:
    notes = [f"resumed from {checkpoint}: {done} of {steps} steps are done"]
    if done >= steps:
        notes.append("the run is complete: raise --iters or --epochs to continue")
    if stretched:
        notes.append("the number of steps has changed, and with it the learning rate schedule")
    return notes
