"""Metrics files of a run: metrics.jsonl and metrics.csv; TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from jax_lora.errors import CheckpointError, ConfigError, DataError, install_command
from jax_lora.report.wandb_log import WandbLog
from jax_lora.storage import schema
from jax_lora.storage.atomic_writes import append_text, convert_os_errors, write_file
from jax_lora.storage.json_files import parse_json, read_limited
from jax_lora.storage.safe_paths import given_path

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
_VALUES = schema.object_of(schema.optional(schema.NUMBER))
_STEP = schema.fields({"iter": schema.INTEGER}, required=("iter",))


class MetricsLog:
    """Append metrics to every metrics file of a run.

    Args:
      folder: The run folder.
      tensorboard: Whether to write TensorBoard events.
      wandb: The settings of the run, to log it to Weights & Biases; None: it is not.
      resume_at: Steps already done. Rows of later steps, which the run writes again, and
        incomplete lines are removed.

    Raises:
      ConfigError: The package of TensorBoard or of Weights & Biases is not installed.
      CheckpointError: A file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        wandb: dict[str, Any] | None = None,
        resume_at: int = 0,
    ):
        """Create or truncate the files."""
        self._folder = folder
        self._board = _open_board(folder, resume_at) if tensorboard else None
        self._wandb = None if wandb is None else WandbLog(folder, wandb, resumes=resume_at > 0)
        kept = _rows_up_to(folder / JSONL, resume_at) if resume_at else []
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        table = ",".join(COLUMNS) + "\n" + "".join(map(_csv_line, kept))
        write_file(folder / JSONL, lines, CheckpointError)
        write_file(folder / CSV, table, CheckpointError)

    def log(self, values: dict[str, Any]) -> None:
        """Append a row of values by the names in `COLUMNS`; NaN and infinity are written as null.

        Raises:
          CheckpointError: A file cannot be written; no incomplete line is left in it.
        """
        row = finite(values)
        append_text(self._folder / JSONL, json.dumps(row) + "\n", CheckpointError)
        append_text(self._folder / CSV, _csv_line(row), CheckpointError)
        if self._board is not None:
            with convert_os_errors(self._folder / TENSORBOARD, CheckpointError):
                for name, value in row.items():
                    if name != "iter" and value is not None:
                        self._board.add_scalar(name, value, row["iter"])
                self._board.flush()
        if self._wandb is not None:
            self._wandb.log(row)

    def close(self) -> None:
        """Close the TensorBoard file and the run of Weights & Biases."""
        if self._wandb is not None:
            self._wandb.close()
        if self._board is not None:
            with convert_os_errors(self._folder / TENSORBOARD, CheckpointError):
                self._board.close()


def _csv_line(row: dict[str, Any]) -> str:
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(row)
    return line.getvalue()


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not support, with None."""
    wrong = lambda value: isinstance(value, float) and not math.isfinite(value)  # noqa: E731
    return {name: None if wrong(value) else value for name, value in values.items()}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a row for each report and validation of a run from its folder, or its metrics.jsonl.

    Raises:
      DataError: The file is missing, empty or damaged.
    """
    path = given_path(path, DataError)
    file = path / JSONL if path.is_dir() else path
    if not file.is_file():
        got = f"a folder without {JSONL}" if path.is_dir() else "no such file"
        raise _unreadable(str(path), got)
    rows = []
    content = read_limited(file, DataError, "metrics_bytes")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            row = _parsed(line)
            if problems := _problems(row):
                got = repr(line[:100].decode("utf-8", "replace")) if row is None else problems[:5]
                raise _unreadable(f"{file}:{number}", got)
            rows.append(row)
    if not rows:
        raise _unreadable(str(file), "an empty file")
    return rows


def _unreadable(where: str, got: str | list[str]) -> DataError:
    return DataError(
        where,
        got=got,
        expected=f"a run folder with the {JSONL} that jax-lora train writes",
        fix="Check the path. A run has no metrics before its first report.",
    )


def _parsed(line: bytes) -> Any:
    """Parse a line; None if it is not JSON."""
    try:
        return parse_json(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _problems(row: Any) -> list[str]:
    return list(schema.problems(row, _VALUES)) or list(schema.problems(row, _STEP))


def _rows_up_to(file: Path, step: int) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    content = read_limited(file, CheckpointError, "metrics_bytes")
    rows = [row for row in map(_parsed, content.split(b"\n")) if not _problems(row)]
    return [row for row in rows if row["iter"] <= step]


def _open_board(folder: Path, resume_at: int) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise ConfigError(
            "log: tensorboard",
            got="tensorboardX is not installed",
            expected="tensorboardX, which writes TensorBoard events without TensorFlow",
            fix=f"{install_command('cli')}, or remove tensorboard from log.",
        ) from error
    # TensorBoard then hides the earlier events from this step on.
    purge = resume_at + 1 if resume_at else None
    with convert_os_errors(folder / TENSORBOARD, CheckpointError):
        return tensorboardX.SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
