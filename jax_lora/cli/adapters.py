"""Finds what an adapter was trained on, and merges it into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_lora.checkpoint import load_adapter
from jax_lora.cli.base_model import BaseModel
from jax_lora.finetune.run_folder import find_checkpoint, read_run_config
from jax_lora.merge import merge


def checkpoint_of(path: str) -> tuple[Path, dict[str, Any]]:
    """Find a checkpoint and the settings of its run.

    Args:
      path: `--adapter-path`.

    Returns:
      The checkpoint's folder, and the settings, which may be empty.
    """
    checkpoint = find_checkpoint(path)
    return checkpoint, read_run_config(checkpoint)


def merged(base: BaseModel, checkpoint: Path) -> Any:
    """Merge a saved adapter into its base: from then on it costs nothing.

    Args:
      base: The model that the adapter was trained on.
      checkpoint: The adapter.

    Returns:
      `{"params": params}` with the adapter in them.
    """
    return merge(base.variables, load_adapter(checkpoint, base=base.variables))
