"""A plan as text of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from jax_lora.plan.fit import SHARE, Fit
from jax_lora.plan.methods import Estimate
from jax_lora.plan.paper import impossible, paper_lines
from jax_lora.plan.planning import Plan
from jax_lora.plan.program import ProgramMemory
from jax_lora.plan.units import show_bytes, show_count, show_seconds

COLUMNS = 80
_ROWS = ("weights", "adapter", "moments", "gradients", "activations", "logits", "total")
_NAMES = {"weights": "base weights", "moments": "optimizer moments"}


def plan_lines(plan: Plan, rate: float) -> list[str]:
    """Lay a plan out.

    Args:
      plan: The plan.
      rate: Operations per second of this device.

    Returns:
      Lines.
    """
    lines = [*_head(plan), "", *_table(plan, rate), "", *_notes(plan, rate), "", *_program(plan)]
    if plan.model.name == "gpt3-175b":
        lines += ["", *_paper(plan)]
    return lines


def _head(plan: Plan) -> list[str]:
    model, settings, data = plan.model, plan.choices.settings, plan.data
    size = model.shape.size
    share = f"{100 * plan.trained / size:.2g}%"
    rows = settings.batch_size * settings.grad_accumulation_steps
    longest = data.largest
    head = [
        _fitted("Model", f"{model.name}, {model.dtype}, {size:,} parameters"),
        _fitted(
            "LoRA",
            f"rank {settings.rank} on {plan.adapted} matrices, {plan.trained:,} trained ({share})",
        ),
        _fitted("Data", data.source if data.rows is None else _data(plan)),
        _fitted(
            "Batch",
            f"{rows} rows of {longest.length} tokens, {longest.learned} learned, at most"
            + (f"; {settings.grad_accumulation_steps} parts" if rows > settings.batch_size else ""),
        ),
    ]
    if plan.steps is not None:
        head.append(_fitted("Steps", f"{plan.steps:,}"))
    return head


def _data(plan: Plan) -> str:
    data = plan.data
    tokens = f", {data.tokens:,} tokens an epoch" if data.tokens else ""
    counted = f": {data.rows:,} rows{tokens}"
    return _short(data.source, COLUMNS - 7 - len(counted)) + counted


def _fitted(name: str, text: str) -> str:
    return f"{name:<7}" + _short(text, COLUMNS - 7)


def _short(text: str, width: int) -> str:
    """Keep the end of what is too long, as the end of a path says the most."""
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _table(plan: Plan, rate: float) -> list[str]:
    columns = plan.columns
    many = "step" if plan.steps is None else "run"
    rows = [("trained", [show_count(each.trained) for each in columns.values()])]
    rows += [
        (_NAMES.get(row, row), [_cell(each, row) for each in columns.values()]) for row in _ROWS
    ]
    rows += [
        ("operations a step", [show_count(each.flops) for each in columns.values()]),
        (f"time of a {many}", [show_seconds(flops / rate) for flops in plan.flops.values()]),
    ]
    heading = _row("", list(columns))
    rule = "-" * len(heading)
    lines = [heading, rule]
    for name, cells in rows:
        if name in ("total", "operations a step"):
            lines.append(rule)
        lines.append(_row(name, cells))
    return lines


def _cell(estimated: Estimate, row: str) -> str:
    value = getattr(estimated, row)
    return show_bytes(value) if value else "-"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells)


def _notes(plan: Plan, rate: float) -> list[str]:
    traced = ", activations by a trace" if plan.model.module and plan.model.decodes else ""
    notes = [f"By formula{traced}; for one device that takes the whole batch."]
    notes += ["Full: gradients and moments in the base's own type."]
    notes += ["int8, NF4: by formula; not a training mode of this command yet."]
    pace = show_count(rate) + "FLOP/s"
    notes += [f"Time: an estimate, at this device's matrix products ({pace}); a run takes longer."]
    if plan.data.note:
        notes += [f"Rows: {plan.data.note}."]
    return [line for note in notes for line in _wrapped(note)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, subsequent_indent="  ")


def _program(plan: Plan) -> list[str]:
    program = plan.program
    if program is None:
        return _wrapped(f"This run was not compiled: {plan.why}.")
    return [
        f"The step of this run, compiled for its largest batch in {program.seconds:.1f} s",
        *_program_rows(program),
    ]


def _program_rows(program: ProgramMemory) -> list[str]:
    stays = program.arguments + program.results - program.reused
    rows = [
        ("base, adapter, moments, batch", stays),
        ("activations, gradients, logits", program.temporary),
        ("peak of a device", program.peak),
    ]
    if program.devices > 1:
        rows.append((f"{program.devices} devices together", program.everywhere))
    return [f"  {name:<32}{show_bytes(size):>12}" for name, size in rows]


def fit_lines(found: Fit, memory: float, command: str) -> list[str]:
    """Lay out what to change.

    Args:
      found: The changes.
      memory: Bytes that there are.
      command: What to type.

    Returns:
      Lines.
    """
    have, share = show_bytes(memory), f"{1 - SHARE:.0%}"
    if not found.changes:
        says = "fits" if found.fits else "does not fit"
        return _wrapped(f"{show_bytes(found.before)} {says} {have} ({share} is left free).")
    lines = [f"To fit {have} ({share} is left free), from {show_bytes(found.before)}:"]
    for change, total in zip(found.changes, found.totals, strict=True):
        lines += [f"  {change.flags:<46}{show_bytes(total):>10}", f"      {change.says}"]
    if not found.fits:
        return [*lines, f"Nothing fits: with all of these it is {show_bytes(found.after)} still."]
    if found.choices.quantize != "none":
        return [*lines, "Only a quantized base fits, which this command cannot train yet."]
    return [*lines, "Type:", *_typed(command)]


def _typed(command: str) -> list[str]:
    """Break a command before its flags, so that it can be copied as it stands."""
    words = command.replace(" --", "\n--").split("\n")
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= COLUMNS:
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"      {word}")
    return lines


def _paper(plan: Plan) -> list[str]:
    lines = ["The LoRA paper's numbers, from these shapes                      paper says"]
    lines += [
        f"  {name:<22}{value:<38}{said:>13}".rstrip()
        for name, value, said in paper_lines(plan.model.shape)
    ]
    return [*lines, *impossible(plan.model.shape)]
