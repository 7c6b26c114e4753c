"""Plot the loss curves of runs as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_lora.errors import ConfigError
from jax_lora.report.curves import Curves, read_curves
from jax_lora.storage.atomic_writes import replacing

STYLES = ("-", "--", "-.", ":")  # distinguishable in grayscale


def write_plot(runs: Sequence[Curves], file: Path, *, log: bool = False) -> None:
    """Plot the curves of runs to a PNG file, with a logarithmic axis or not.

    Raises:
      ConfigError: The file cannot be written.
    """
    # pyplot would keep the figure in memory and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, run in enumerate(runs):
        label = f"{run.name}: " if len(runs) > 1 else ""
        color, style = f"C{index % 10}", STYLES[index // 10 % len(STYLES)]
        if run.train:
            marker = style + ("." if len(run.train) == 1 else "")
            named: dict[str, Any] = {"color": color, "label": f"{label}training"}
            axes.plot(*zip(*run.train, strict=True), marker, alpha=0.6, linewidth=1, **named)
        if run.valid:
            named = {"color": color if len(runs) > 1 else "C1", "label": f"{label}validation"}
            axes.plot(
                *zip(*run.valid, strict=True), style + "o", markersize=4, linewidth=2, **named
            )
        if run.best is not None:
            step, loss = run.best
            axes.plot([step], [loss], "k*", markersize=11, zorder=5)
            axes.annotate(
                f"{loss:.3f}",
                (step, loss),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)
    axes.legend(fontsize=9, loc="upper right")  # "best" is slow for long curves
    with replacing(file, ConfigError) as part:
        figure.savefig(part, format="png")


def write_run_plot(run: Path) -> None:
    """Plot the curves of a run to loss.png in its folder."""
    write_plot([read_curves(run)], run / "loss.png")
