"""Summarize a finished run for every reporter."""

from __future__ import annotations

from jax_lora.report.events import RunResult


def summary_lines(result: RunResult) -> list[tuple[str, str]]:
    """Summarize a finished run, as pairs of a name and a value."""
    working = max(result.seconds - result.compile_seconds, 1e-9)
    tokens = f"{result.tokens:,}"
    if result.unit == "Tokens":
        tokens = (
            f"{result.raw_tokens:,} in the text, {tokens} with the template, "
            f"{result.padded_tokens:,} with padding"
        )
    compiling = f"{result.compile_seconds:.1f} s compiling {result.programs} function"
    peak = f"{result.peak_memory:.2f} GB{' resident' if result.resident else ''}"
    if result.planned_memory:
        peak += f" (planned for the step: {result.planned_memory:.2f} GB)"
    lines = [
        ("Steps", f"{result.steps}{' (early stop)' if result.stopped_early else ''}"),
        (result.unit, tokens),
        ("Time", f"{result.seconds:.1f} s, of which {compiling}{'s' * (result.programs != 1)}"),
        ("Speed", f"{result.tokens / working:,.0f} {result.unit.lower()}/s"),
        ("Peak memory", peak),
    ]
    if result.val_loss is not None:
        lines.append(("Validation loss", f"{result.val_loss:.4f}"))
    if result.best is not None:
        lines.append(("Best", f"{result.best[0]:.4f} at {result.best[1]}"))
    if result.checkpoint is not None:
        lines.append(("Checkpoint", str(result.checkpoint)))
    return lines
