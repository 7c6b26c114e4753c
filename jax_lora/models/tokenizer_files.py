"""What belongs to a model's folder beside its weights and config.json: tokenizer, templates."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["copy_companions"]

# In all the forms there are.
PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a model needs beside its weights, so that the new folder is whole.

    Args:
      source: The model's own folder.
      target: The folder that `jl.models.save` wrote.
    """
    for pattern in PATTERNS:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(file, target / file.name)
