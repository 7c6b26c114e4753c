"""The loss curves of runs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jax_lora.report.curves import Curves, read_curves

STYLES = ("-", "--", "-.", ":")  # told apart in grey too


def write_plot(runs: Sequence[Curves], file: Path, *, log: bool = False) -> None:
    """Draw the curves of one or several runs into a PNG.

    Args:
      runs: The runs.
      file: The picture.
      log: Draw the loss on a logarithmic axis.
    """
    # The figure by itself: pyplot would keep it, and look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, run in enumerate(runs):
        label = f"{run.name}: " if len(runs) > 1 else ""
        color, style = f"C{index % 10}", STYLES[index // 10 % len(STYLES)]
        if run.train:
            steps, losses = zip(*run.train, strict=True)
            marker = "." if len(steps) == 1 else ""
            axes.plot(
                steps,
                losses,
                style + marker,
                color=color,
                alpha=0.6,
                linewidth=1,
                label=f"{label}training",
            )
        if run.valid:
            steps, losses = zip(*run.valid, strict=True)
            axes.plot(
                steps,
                losses,
                style + "o",
                color=color if len(runs) > 1 else "C1",
                markersize=4,
                linewidth=2,
                label=f"{label}validation",
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
    axes.set_ylabel("loss of the learned tokens")
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)
    axes.legend(fontsize=9)
    figure.savefig(file)


def write_run_plot(run: Path) -> None:
    """Draw a run's curves into its own folder, as loss.png."""
    write_plot([read_curves(run)], run / "loss.png")
