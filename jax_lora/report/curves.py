"""Loss curves of a run, read from its metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_lora.report.metrics import read_metrics

Points = tuple[tuple[int, float], ...]  # (step, loss)


@dataclasses.dataclass(frozen=True)
class Curves:
    """Training and validation loss by step.

    Args:
      name: Name of the run folder.
      train: Training loss by step.
      valid: Validation loss by step.
    """

    name: str
    train: Points
    valid: Points

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss, or None."""
        return min(self.valid, key=lambda point: point[1], default=None)


def read_curves(run: str | Path) -> Curves:
    """Read the losses of a run folder, or its metrics.jsonl."""
    path, rows = Path(run), read_metrics(run)
    name = (path if path.is_dir() else path.parent).resolve().name
    return Curves(name, _points(rows, "train_loss"), _points(rows, "val_loss"))


def _points(rows: Sequence[dict[str, Any]], name: str) -> Points:
    return tuple((row["iter"], row[name]) for row in rows if row.get(name) is not None)
