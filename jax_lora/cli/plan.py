"""Estimate the memory, operations and time of a run, without loading a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.cli import train
from jax_lora.cli.base_model import BUNDLED, data_folder, model_folder
from jax_lora.cli.names import add_name
from jax_lora.cli.options import DEFAULTS, given
from jax_lora.cli.parser import Parser
from jax_lora.cli.resolve_config import Choice, choose
from jax_lora.errors import ConfigError
from jax_lora.finetune.compile_cache import use_compile_cache
from jax_lora.finetune.devices import use_all_cores
from jax_lora.plan.accelerators import parse_target
from jax_lora.plan.compiled_step import StepMemory, step_memory
from jax_lora.plan.data_shapes import DataShapes, data_shapes
from jax_lora.plan.fit import SHARE, Fit, fit, formula_total
from jax_lora.plan.plan_tables import fit_lines, plan_lines
from jax_lora.plan.planned_model import PlannedModel, plan_folder, plan_shape, with_dtype
from jax_lora.plan.planning import Plan, make_plan, matmul_rate, why_not_compiled
from jax_lora.plan.published import NAMES
from jax_lora.plan.target_plan import plan_for_target
from jax_lora.plan.target_screen import target_lines
from jax_lora.plan.units import read_bytes
from jax_lora.storage.atomic_writes import write_file

HELP = "estimate memory, operations and time of a run"
EXAMPLE = """\
jax-lora plan path/to/model --data path/to/data --batch-size 8
jax-lora plan --shape llama-3-8b --fit 24GB
"""
_TRIES = 3  # suggestions of --fit to check by compiling


def add_options(parser: Parser) -> None:
    """Add the options of `train` and further options."""
    train.add_options(parser)
    text = "JSON file of the plan to write; - prints it instead of the tables [none]"
    add_name(parser, "--save-path", text, metavar="FILE")
    add = parser.section("plan").add_argument
    text = f"plan for these shapes instead of MODEL: a config.json, or {', '.join(NAMES)} [none]"
    add("--shape", metavar="NAME", help=text)
    text = "suggest changes that fit into this memory, such as 24GB, 16GiB, 800MB [none]"
    add("--fit", metavar="BYTES", help=text)
    text = "also compile the training step, for models of up to 1.5 billion parameters [yes]"
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "compile for devices that are not here: h100:1, h100:8, v5e:2x4, v6e:1x1, ... [none]"
    add("--topology", metavar="TARGET", help=text)


def run(options: argparse.Namespace) -> int:
    """Print the plan, and return the exit code."""
    memory = None if options.fit is None else read_bytes(options.fit)
    choice = _choose(options)
    if options.topology is not None:
        return _run_for_target(options, choice)
    use_all_cores()
    use_compile_cache()
    on_cpu = jax.default_backend() == "cpu"
    model, data = _model_and_data(options, choice, "float32" if on_cpu else None)
    plan = make_plan(model, data, choice.settings, compiling=options.compile)
    rate = matmul_rate(jnp.dtype(model.dtype))
    found = None if memory is None else _fit(plan, memory, options.compile)
    if options.save_path != "-":
        print("\n".join(plan_lines(plan, rate)))
        if found is not None and memory is not None:
            command = _command(options, choice, found)
            print("\n" + "\n".join(fit_lines(found, memory, command)))
    if options.save_path is not None:
        _write_json(options.save_path, _as_dict(plan, rate, found))
    return 0


def _run_for_target(options: argparse.Namespace, choice: Choice) -> int:
    """Print what a step needs on devices that are not here."""
    if options.fit is not None:
        raise ConfigError(
            "--fit",
            got="--topology as well",
            expected="one of them: --topology compares with the memory of its devices",
            fix="Leave --fit out.",
        )
    target = parse_target(options.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    model, data = _model_and_data(options, choice, training_dtype=None)
    if model.module is None or not model.decodes:
        raise ConfigError(
            "--topology",
            got=model.name,
            expected="a decoder that this package implements",
            fix="Leave --topology out: the formulas cover other models.",
        )
    length, targets, _ = data.largest
    plan = plan_for_target(model, choice.settings, target, length=length, targets=targets)
    if options.save_path != "-":
        print("\n".join(target_lines(model, choice.settings, data, plan)))
    if options.save_path is not None:
        _write_json(options.save_path, plan.as_dict() | {"model": model.name, "dtype": model.dtype})
    return 0


def _choose(options: argparse.Namespace) -> Choice:
    """Resolve the settings as `train` does."""
    if options.shape is None:
        return choose(options)
    named = getattr(options, "model", None)
    if named is not None:
        raise ConfigError(
            f"--shape {options.shape}",
            got=f"also the model {named}",
            expected="either --shape or MODEL",
            fix="Remove MODEL, or --shape.",
        )
    # Without a model name, `choose` would use the settings of the bundled model.
    choice = choose(argparse.Namespace(**{**vars(options), "model": options.shape}))
    return dataclasses.replace(choice, model=None)


def _model_and_data(
    options: argparse.Namespace, choice: Choice, training_dtype: str | None
) -> tuple[PlannedModel, DataShapes]:
    """Find the shapes of the model and of the data; --shape has no default data.

    `training_dtype` is what dtype "auto" means; None: the dtype of the files.
    """
    dtype, data = choice.settings.dtype, choice.data
    if options.shape is not None:
        model = plan_shape(options.shape, None if dtype == "auto" else dtype)
        folder = None
        data = None if data is None else data_folder(data)
    else:
        folder = model_folder(choice.model, weights=options.pin is not None)
        name = choice.model or BUNDLED
        model = plan_folder(folder, training_dtype if dtype == "auto" else dtype, name)
        # The bundled data tells nothing about a run of another model.
        data = data_folder(data) if data is not None or name == BUNDLED else None
    asked = "max_seq_length" in choice.asked
    shapes = data_shapes(data, folder, choice.settings, model.max_length, asked=asked)
    if data is not None and choice.data is None:
        shapes = dataclasses.replace(shapes, source=BUNDLED)
    return model, shapes


# -----------------------------------------------------------------------------------------------
# --fit
# -----------------------------------------------------------------------------------------------


def _fit(plan: Plan, memory: float, compiling: bool) -> Fit:
    """Search by formula, corrected by the difference to the compiled step."""
    length, targets, _ = plan.data.largest
    formula = formula_total(plan.model, length, targets)
    # On a CPU, products of 16-bit arrays are slow and need float32 copies: bfloat16 is not advised.
    dtype = "" if jax.default_backend() == "cpu" else plan.model.dtype
    more = 0.0 if plan.compiled is None else _all_memory(plan.compiled) - formula(plan.settings)
    tries = _TRIES if compiling and plan.compiled is not None else 0
    while True:
        total = lambda settings, more=more: formula(settings) + more  # noqa: E731
        found = fit(plan.settings, memory, total, dtype=dtype, length=length)
        compiled = _compiled(plan, found) if tries and found.changes else None
        if compiled is None or compiled <= SHARE * memory:
            return found
        more, tries = compiled - formula(found.settings), tries - 1


def _all_memory(step: StepMemory) -> float:
    """Return the memory of all devices on a CPU, where they share it, else of one device."""
    return step.everywhere if jax.default_backend() == "cpu" else step.peak


def _compiled(plan: Plan, found: Fit) -> float | None:
    """Compile the suggested step for its memory; None if that is impossible."""
    settings = found.settings
    if not found.fits or why_not_compiled(plan.model):
        return None
    model = with_dtype(plan.model, settings.dtype)
    length, targets, _ = plan.data.largest
    cut = min(length, settings.max_seq_length)
    step = step_memory(model, settings, length=cut, targets=min(targets, cut))
    return None if step is None else _all_memory(step)


def _command(options: argparse.Namespace, choice: Choice, found: Fit) -> str:
    """Build the command that trains with the suggested changes."""
    words = ["jax-lora", "train"]
    if options.shape is not None:
        words.append("MODEL")
    elif choice.model:
        words.append(shlex.quote(choice.model))
    if choice.data:
        words += ["--data", shlex.quote(choice.data)]
    if options.config:
        words += ["-c", shlex.quote(options.config)]
    changed = " ".join(change.flags for change in found.changes)
    typed = given(options, DEFAULTS)
    kept = [_flag(name, value) for name, value in typed.items() if _flag_name(name) not in changed]
    return " ".join([*words, *filter(None, kept), changed])


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return _flag_name(name) if value else "--no-" + name.replace("_", "-")
    values = value if isinstance(value, list) else [value]  # a list: the flag was repeated
    return " ".join(f"{_flag_name(name)} {shlex.quote(str(each))}" for each in values)


# -----------------------------------------------------------------------------------------------
# JSON
# -----------------------------------------------------------------------------------------------


def _write_json(path: str, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    if path == "-":
        print(text, end="")
    else:
        write_file(Path(path), text, ConfigError)


def _as_dict(plan: Plan, rate: float, found: Fit | None) -> dict[str, Any]:
    return {
        "model": plan.model.name,
        "dtype": plan.model.dtype,
        "parameters": plan.model.shape.size,
        "trainable": plan.method.trainable,
        "data": dataclasses.asdict(plan.data),
        "steps": plan.steps,
        "methods": {name: column.as_dict() for name, column in plan.columns.items()},
        "own": plan.columns["full" if plan.method.full else "LoRA"].as_dict(),
        "flops": plan.flops,
        "flops_per_second": rate,
        "seconds": {name: flops / rate for name, flops in plan.flops.items()},
        "compiled": None
        if plan.compiled is None
        else dataclasses.asdict(plan.compiled) | {"peak": plan.compiled.peak},
        "process": plan.process,
        "not_compiled": plan.why or None,
        "fit": None
        if found is None
        else {
            "fits": found.fits,
            "before": found.before,
            "after": found.after,
            "changes": [change.flags for change in found.changes],
        },
    }
