"""The end of a run as names and values, for every way of showing it."""

from __future__ import annotations

from jax_lora.report.events import RunResult


def summary_lines(result: RunResult) -> list[tuple[str, str]]:
    """Describe a finished run.

    Args:
      result: The run.

    Returns:
      A name and a value a line.
    """
    working = max(result.seconds - result.compile_seconds, 1e-9)
    lines = [
        ("Steps", f"{result.steps}{' (no better for too long)' if result.stopped_early else ''}"),
        ("Tokens", _tokens(result)),
        ("Time", f"{result.seconds:.1f} s, of which {_compiling(result)}"),
        ("Speed", f"{result.tokens / working:,.0f} tokens/s"),
        ("Peak memory", f"{result.peak_memory:.2f} GB{_kind(result)}{_planned(result)}"),
    ]
    if result.val_loss is not None:
        lines.append(("Validation loss", f"{result.val_loss:.4f}"))
    if result.best is not None:
        lines.append(("Best", f"{result.best[0]:.4f} at {result.best[1]}"))
    lines.append(("Checkpoint", str(result.checkpoint)))
    return lines


def _tokens(result: RunResult) -> str:
    return (
        f"{result.raw_tokens:,} of text, {result.tokens:,} with template, "
        f"{result.padded_tokens:,} with padding"
    )


def _compiling(result: RunResult) -> str:
    programs = "program" if result.programs == 1 else "programs"
    return f"{result.compile_seconds:.1f} s compiling {result.programs} {programs}"


def _kind(result: RunResult) -> str:
    return " resident" if result.resident else ""


def _planned(result: RunResult) -> str:
    return (
        f" (planned for the step: {result.planned_memory:.2f} GB)" if result.planned_memory else ""
    )
