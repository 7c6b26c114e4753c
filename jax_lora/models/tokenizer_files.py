"""The other files of a model folder: tokenizer, chat template, generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from jax_lora.errors import ModelError
from jax_lora.storage.atomic_writes import replacing, write_file

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def copy_companions(source: Path, target: Path, chat_template: str | None = None) -> None:
    """Copy all files that a model needs, except its weights and `config.json`.

    `chat_template` is the text of another default chat template than that of `source`.

    Raises:
      ModelError: A file cannot be copied.
    """
    for pattern in _PATTERNS:
        for file in filter(Path.is_file, source.glob(pattern)):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            with replacing(copy, ModelError) as part:
                shutil.copyfile(file, part)
    if chat_template is not None:
        write_file(target / "chat_template.jinja", chat_template, ModelError)
