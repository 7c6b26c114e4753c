"""Plot the loss curves of runs as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_lora.report.curves import Curves, Points

TRAIN, VALID = "·x+*oabcdefgh", "●■▲◆○□△◇"
HEIGHT = 16


def text_plot(runs: Sequence[Curves], width: int = 80, *, log: bool = False) -> list[str]:
    """Plot the curves of runs as lines of `width` characters, with a logarithmic axis or not."""
    lines = [(marks, of) for marks, of in _lines(runs) if of]
    points = [point for _, of in lines for point in of]
    if not points:
        return ["no losses to plot"]
    value = (lambda loss: math.log10(max(loss, 1e-12))) if log else (lambda loss: loss)
    low, high = (pick(value(loss) for _, loss in points) for pick in (min, max))
    first, last = (pick(step for step, _ in points) for pick in (min, max))
    levels = [low + (high - low) * row / (HEIGHT - 1) for row in range(HEIGHT)]
    labels = [f"{10**level if log else level:.3g}" for level in levels]
    margin = max(map(len, labels))
    columns = max(width - margin - 2, 10)
    grid = [[" "] * columns for _ in range(HEIGHT)]
    for mark, of in lines:
        for step, loss in of:
            column = round((step - first) / max(last - first, 1) * (columns - 1))
            row = round((value(loss) - low) / max(high - low, 1e-12) * (HEIGHT - 1))
            grid[row][column] = mark
    drawn = [
        f"{labels[row] if row % 3 == 0 else '':>{margin}} │{''.join(grid[row]).rstrip()}"
        for row in reversed(range(HEIGHT))
    ]
    axis = f"{'':>{margin}} └{'─' * columns}"
    ends = f"{'':>{margin}}  {first}{last:>{max(columns - len(str(first)), 1)}}"
    return [*drawn, axis, ends, *_legend(runs)]


def _lines(runs: Sequence[Curves]) -> list[tuple[str, Points]]:
    """Return training curves first, so that the fewer validation points are drawn on top."""
    train = [(TRAIN[i % len(TRAIN)], run.train) for i, run in enumerate(runs)]
    return train + [(VALID[i % len(VALID)], run.valid) for i, run in enumerate(runs)]


def _legend(runs: Sequence[Curves]) -> list[str]:
    legend = []
    for index, run in enumerate(runs):
        line = f"{TRAIN[index % len(TRAIN)]} {run.name}, training"
        if run.best is not None:
            step, loss = run.best
            mark = VALID[index % len(VALID)]
            line += f"   {mark} validation, best {loss:.4f} at step {step}"
        legend.append(line)
    return legend
