"""Summarize a finished run for every reporter."""

from __future__ import annotations

from jax_lora.report.events import RunResult


def summary_lines(result: RunResult) -> list[tuple[str, str]]:
    """Summarize a finished run.

    Args:
      result: The result of the run.

    Returns:
      Pairs of a name and a value.
    """
    working = max(result.seconds - result.compile_seconds, 1e-9)
    lines = [
        ("Steps", f"{result.steps}{' (early stop)' if result.stopped_early else ''}"),
        (result.unit, _tokens(result)),
        ("Time", f"{result.seconds:.1f} s, of which {_compiling(result)}"),
        ("Speed", f"{result.tokens / working:,.0f} {result.unit.lower()}/s"),
        ("Peak memory", f"{result.peak_memory:.2f} GB{_kind(result)}{_planned(result)}"),
    ]
    if result.val_loss is not None:
        lines.append(("Validation loss", f"{result.val_loss:.4f}"))
    if result.best is not None:
        lines.append(("Best", f"{result.best[0]:.4f} at {result.best[1]}"))
    if result.checkpoint is not None:
        lines.append(("Checkpoint", str(result.checkpoint)))
    return lines


def _tokens(result: RunResult) -> str:
    if result.unit != "Tokens":
        return f"{result.tokens:,}"
    return (
        f"{result.raw_tokens:,} in the text, {result.tokens:,} with the template, "
        f"{result.padded_tokens:,} with padding"
    )


def _compiling(result: RunResult) -> str:
    functions = "function" if result.programs == 1 else "functions"
    return f"{result.compile_seconds:.1f} s compiling {result.programs} {functions}"


def _kind(result: RunResult) -> str:
    return " resident" if result.resident else ""


def _planned(result: RunResult) -> str:
    return (
        f" (planned for the step: {result.planned_memory:.2f} GB)" if result.planned_memory else ""
    )
