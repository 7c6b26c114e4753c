"""The other files of a model folder: tokenizer, chat template, generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from jax_lora.errors import ModelError
from jax_lora.storage.atomic_writes import replacing

__all__ = ["copy_companions"]

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy all files that a model needs, except its weights and `config.json`.

    Args:
      source: The model's folder.
      target: The folder that `jl.models.save` wrote.

    Raises:
      ModelError: A file cannot be copied.
    """
    for pattern in _PATTERNS:
        for file in filter(Path.is_file, source.glob(pattern)):
            with replacing(target / file.name, ModelError) as part:
                shutil.copyfile(file, part)
