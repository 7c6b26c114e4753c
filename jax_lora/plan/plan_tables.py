"""Format a plan as text of at most 80 columns."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence

from jax_lora.plan.fit import SHARE, Fit
from jax_lora.plan.paper import paper_lines
from jax_lora.plan.planning import Plan
from jax_lora.plan.published import GPT3
from jax_lora.plan.units import show_bytes, show_count, show_seconds

COLUMNS = 80
_MEMORY = {
    "weights": "base weights", "adapter": "adapter", "optimizer_state": "optimizer state",
    "gradients": "gradients", "activations": "activations", "logits": "logits",
    "copies": "float32 copies", "total": "total",
}  # fmt: skip


def plan_lines(plan: Plan, rate: float) -> list[str]:
    """Format a plan as lines, with times for a device of `rate` operations per second."""
    lines = [*_head(plan), "", *_table(plan, rate), "", *_notes(plan, rate), "", *_compiled(plan)]
    return [*lines, "", *paper_lines(plan.model.shape)] if plan.model.name == GPT3 else lines


def _head(plan: Plan) -> list[str]:
    model, settings, data = plan.model, plan.settings, plan.data
    size, parts = model.shape.size, settings.grad_accumulation_steps
    trainable = plan.method.trainable
    adapted = sum(kernel.count for kernel in plan.method.adapted)
    counted = "" if data.examples is None else f": {data.examples:,} examples"
    counted += f", {data.tokens:,} tokens per epoch" if data.tokens else ""
    head = {
        "Model": f"{model.name}, {model.dtype}, {size:,} parameters",
        "LoRA": f"rank {settings.rank}, {adapted} adapted kernels, "
        f"{trainable:,} parameters ({100 * trainable / size:.2g}%)",
        "Data": _short(data.source, COLUMNS - 7 - len(counted)) + counted,
        "Batch": f"{'' if data.examples is None else 'the largest: '}{settings.batch_size * parts}"
        f" rows of {data.largest.length} tokens, {data.largest.targets} of them target tokens"
        + (f"; {parts} parts" if parts > 1 else ""),
    }
    if plan.steps is not None:
        head["Steps"] = f"{plan.steps:,}"
    return [f"{name:<7}" + _short(text, COLUMNS - 7) for name, text in head.items()]


def _short(text: str, width: int) -> str:
    """Cut the start of a long text: the end of a path identifies it."""
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _table(plan: Plan, rate: float) -> list[str]:
    columns = plan.columns.values()
    heading = _row("", list(plan.columns))
    rule = "-" * len(heading)
    memory = {
        name: [show_bytes(size) if (size := getattr(each, field)) else "-" for each in columns]
        for field, name in _MEMORY.items()
        if field != "copies" or any(each.copies for each in columns)
    }
    lines = [heading, rule, _row("trainable", [show_count(c.trainable) for c in columns])]
    lines += [_row(name, cells) for name, cells in memory.items()]
    lines.insert(-1, rule)
    span = "step" if plan.steps is None else "run"
    return [
        *lines,
        rule,
        _row("operations per step", [show_count(each.flops) for each in columns]),
        _row(f"time per {span}", [show_seconds(flops / rate) for flops in plan.flops.values()]),
    ]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells)


def _notes(plan: Plan, rate: float) -> list[str]:
    traced = ", with traced activations" if plan.model.module and plan.model.decodes else ""
    notes = [
        f"Computed by formula{traced}, for one device that holds the whole batch.",
        "full: gradients and optimizer state have the dtype of the base.",
        "int8, NF4: `train --quantize`; a dequantized layer is not counted.",
        f"Time: a lower bound, at the matmul speed of this device ({show_count(rate)}FLOP/s).",
    ]
    notes += [f"Data: {plan.data.note}."] if plan.data.note else []
    return [line for note in notes for line in wrapped(note)]


def wrapped(text: str) -> list[str]:
    """Break a text into lines, indented after the first."""
    return textwrap.wrap(text, COLUMNS, subsequent_indent="  ")


def _compiled(plan: Plan) -> list[str]:
    step = plan.compiled
    if step is None:
        return wrapped(f"The training step was not compiled: {plan.why}.")
    rows = {
        "weights, adapter, optimizer, batch": step.arguments + step.results - step.reused,
        "activations, gradients, logits": step.temporary,
        "peak memory per device": step.peak,
    }
    if step.devices > 1:
        rows[f"peak memory of {step.devices} devices"] = step.everywhere
    if plan.process is not None:
        rows["Python, JAX and the compiled step"] = plan.process
        rows["peak memory of the process"] = step.everywhere + plan.process
    return [
        f"The training step of this run, compiled for its largest batch in {step.seconds:.1f} s",
        *(f"  {name:<36}{show_bytes(size):>12}" for name, size in rows.items()),
    ]


def fit_lines(found: Fit, memory: float, command: str) -> list[str]:
    """Format the result of `--fit`, and the command that trains with the changes."""
    have, share = show_bytes(memory), f"{1 - SHARE:.0%}"
    if not found.changes:
        verb = "fits" if found.fits else "does not fit"
        return wrapped(f"{show_bytes(found.before)} {verb} into {have} ({share} is left free).")
    lines = [f"To fit {show_bytes(found.before)} into {have} ({share} is left free):"]
    for change, total in zip(found.changes, found.totals, strict=True):
        lines += [f"  {change.flags:<46}{show_bytes(total):>10}", f"      {change.effect}"]
    if not found.fits:
        return [*lines, f"This does not fit either: {show_bytes(found.after)} with all changes."]
    return [*lines, "Run:", *_shell_lines(command)]


def _shell_lines(command: str) -> list[str]:
    """Break a command before its flags, with backslashes, so that it can be copied."""
    words: list[str] = []
    for word in shlex.split(command):
        if word.startswith("--") or not words:
            words.append(shlex.quote(word))
        else:
            words[-1] += f" {shlex.quote(word)}"
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= COLUMNS:
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"      {word}")
    return lines
