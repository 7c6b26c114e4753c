"""Metrics files of a run: metrics.jsonl, metrics.csv and, optionally, TensorBoard events."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

from jax_lora.errors import ConfigError, DataError, format_error

JSONL, CSV, TENSORBOARD = "metrics.jsonl", "metrics.csv", "tensorboard"
COLUMNS: tuple[str, ...] = (
    "iter",
    "train_loss",
    "val_loss",
    "learning_rate",
    "it_per_second",
    "tokens_per_second",
    "trained_tokens",
    "peak_memory_gb",
    "val_seconds",
)


class MetricsLog:
    """Append metrics to every metrics file of a run.

    Args:
      folder: The run folder.
      tensorboard: Whether to write TensorBoard events.
      resume_at: Steps already done. Rows of later steps, which the run writes again, and
        incomplete lines are removed.

    Raises:
      ConfigError: `tensorboard` is True and tensorboardX is not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, resume_at: int = 0):
        """Create or truncate the files."""
        self._folder = folder
        self._board = _open_board(folder, resume_at) if tensorboard else None
        kept = _rows_up_to(folder / JSONL, resume_at) if resume_at else []
        _replace(folder / JSONL, "".join(json.dumps(row) + "\n" for row in kept))
        _replace(folder / CSV, ",".join(COLUMNS) + "\n")
        for row in kept:
            self._add_csv(row)

    def log(self, values: dict[str, Any]) -> None:
        """Append a row.

        Args:
          values: Values by the names in `COLUMNS`; NaN and infinity are written as null.
        """
        row = {name: _finite(value) for name, value in values.items()}
        with (self._folder / JSONL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._add_csv(row)
        if self._board is not None:
            for name, value in row.items():
                if name != "iter" and value is not None:
                    self._board.add_scalar(name, value, row["iter"])
            self._board.flush()

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._board is not None:
            self._board.close()

    def _add_csv(self, row: dict[str, Any]) -> None:
        with (self._folder / CSV).open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(row)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the metrics of a run.

    Args:
      path: A run folder or its metrics.jsonl.

    Returns:
      One row for each report and each validation, in order.

    Raises:
      DataError: The file is missing, empty or damaged.
    """
    path = Path(path)
    file = path / JSONL if path.is_dir() else path
    if not file.is_file():
        got = f"a folder without {JSONL}" if path.is_dir() else "no such file"
        raise _unreadable(str(path), got)
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = _parsed(line)
            if row is None:
                raise _unreadable(f"{file}:{number}", repr(line[:100].decode("utf-8", "replace")))
            rows.append(row)
    if not rows:
        raise _unreadable(str(file), "an empty file")
    return rows


def _unreadable(where: str, got: str) -> DataError:
    return DataError(
        format_error(
            where,
            got=got,
            expected=f"a run folder with the {JSONL} that jax-lora train writes",
            fix="Check the path. A run has no metrics before its first report.",
        )
    )


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(row, dict) and isinstance(row.get("iter"), int)
    numbers = known and all(v is None or isinstance(v, (int, float)) for v in row.values())
    return row if numbers else None


def _rows_up_to(file: Path, step: int) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = map(_parsed, file.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None and row["iter"] <= step]


def _replace(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_board(folder: Path, resume_at: int) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise ConfigError(
            format_error(
                "log: tensorboard",
                got="tensorboardX is not installed",
                expected="tensorboardX, which writes TensorBoard events without TensorFlow",
                fix="pip install 'jax-lora[cli]', or remove tensorboard from log.",
            )
        ) from error
    # TensorBoard then hides the earlier events from this step on.
    purge = resume_at + 1 if resume_at else None
    return tensorboardX.SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
