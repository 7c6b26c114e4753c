"""Log the metrics of a run to Weights & Biases, if its package is installed."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.storage.atomic_writes import write_file

RUN_ID = "wandb_id.txt"
PROJECT = "jax-lora"


class WandbLog:
    """A run of Weights & Biases. WANDB_PROJECT and its other environment variables apply.

    Args:
      folder: The run folder, which gets the id of the run.
      config: The settings of the run.
      resumes: Whether to continue the run of the folder's id.

    Raises:
      ConfigError: The package is not installed, or refuses to start a run.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, resumes: bool = False):
        """Start or continue a run."""
        wandb = import_wandb()
        file = folder / RUN_ID
        known = file.read_text(encoding="utf-8").strip() if resumes and file.is_file() else None
        options: dict[str, Any] = {} if known is None else {"id": known, "resume": "allow"}
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                dir=str(folder),
                config=config,
                **options,
            )
        except Exception as error:  # of many types: no login, no network, a damaged folder
            raise ConfigError(
                "log: wandb",
                got=f"{type(error).__name__}: {error}",
                expected="a run of Weights & Biases",
                fix="Log in with wandb login, or set WANDB_MODE=offline.",
            ) from error
        write_file(file, f"{self._run.id}\n", CheckpointError)

    def log(self, row: dict[str, Any]) -> None:
        """Log a row of metrics at its step; missing values are left out."""
        values = {name: value for name, value in row.items() if value is not None}
        self._run.log(values, step=values.pop("iter"))

    def close(self) -> None:
        """Wait until everything is sent or written."""
        self._run.finish()


def import_wandb() -> Any:
    """Import the package of Weights & Biases.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "log: wandb",
            got="wandb is not installed",
            expected="wandb, the package of Weights & Biases",
            fix="pip install wandb, or remove wandb from log.",
        ) from error
