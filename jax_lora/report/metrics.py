"""The numbers of a run in files: metrics.jsonl and metrics.csv, and TensorBoard if asked."""

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
    """Adds a row to every file of metrics.

    Args:
      folder: The run's folder.
      tensorboard: Whether to write for TensorBoard too.
      resume_at: Steps that are done; later rows, which the run is about to write again, are
        dropped, and a line that a kill left half written too.

    Raises:
      ConfigError: TensorBoard is wanted, and the package that writes for it is not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, resume_at: int = 0):
        """Open the files."""
        self._folder = folder
        self._board = _open_board(folder, resume_at) if tensorboard else None
        kept = _rows_up_to(folder / JSONL, resume_at) if resume_at else []
        _replace(folder / JSONL, "".join(json.dumps(row) + "\n" for row in kept))
        _replace(folder / CSV, ",".join(COLUMNS) + "\n")
        for row in kept:
            self._add_csv(row)

    def log(self, values: dict[str, Any]) -> None:
        """Add a row.

        Args:
          values: Numbers by the names of `COLUMNS`; what is no number is written as null.
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
        """Close what is open."""
        if self._board is not None:
            self._board.close()

    def _add_csv(self, row: dict[str, Any]) -> None:
        with (self._folder / CSV).open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(row)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the numbers of a run.

    Args:
      path: The run's folder, or its metrics.jsonl.

    Returns:
      A row a report or validation, in order.

    Raises:
      DataError: There is no such file, it holds no row, or a line is damaged.
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
            expected=f"the folder of a run, with the {JSONL} that jax-lora train writes",
            fix="Check the path; a run that has reported nothing yet has no numbers.",
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
                "--log tensorboard",
                got="the package tensorboardX is not installed",
                expected="tensorboardX, which writes TensorBoard's files without TensorFlow",
                fix="pip install 'jax-lora[cli]', or leave tensorboard out of --log.",
            )
        ) from error
    # TensorBoard itself hides what was written from this step on before.
    purge = resume_at + 1 if resume_at else None
    return tensorboardX.SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
