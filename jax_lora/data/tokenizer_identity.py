"""Checksums of the tokenizer and chat template, by which a checkpoint recognizes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.data.template_files import DEFAULT, template_files
from jax_lora.data.tokenizer_backend import read_document, tokenizer_file
from jax_lora.errors import ModelError
from jax_lora.storage.json_files import json_checksum, read_json

# Texts are cut and padded by the library itself, whatever these settings of the file are.
_UNUSED = ("truncation", "padding")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "mask_token", "add_bos_token", "add_eos_token")


def tokenizer_identity(
    folder: Path, end_ids: Any, *, chat_template: str | None = None
) -> dict[str, str]:
    """Hash the tokenizer, its special tokens, the chat template and the end tokens of a model.

    Args:
      folder: The model's folder.
      end_ids: Token ids at which the model stops: an id, several, or None.
      chat_template: Another chat template than the folder's, or None.

    Returns:
      Checksums by the part that they identify.

    Raises:
      ModelError: A file is damaged.
    """
    tokenizer = {} if tokenizer_file(folder) is None else read_document(folder)
    special = _read(folder / "special_tokens_map.json")
    settings = special | _read(folder / "tokenizer_config.json")
    ends = [end_ids] if isinstance(end_ids, int) else sorted(end_ids or ())
    return {
        "tokenizer": json_checksum({k: v for k, v in tokenizer.items() if k not in _UNUSED}),
        "special tokens": json_checksum({name: _text(settings.get(name)) for name in _SPECIAL}),
        "chat template": json_checksum(chat_template or _chat_templates(folder, settings)),
        "end-of-text token ids": json_checksum([int(each) for each in ends]),
    }


def identity_changes(then: Any, now: Mapping[str, str]) -> list[str]:
    """Compare the checksums of a checkpoint with those of a model.

    Args:
      then: Those of the checkpoint; earlier versions wrote none, which says nothing.
      now: From `tokenizer_identity`.

    Returns:
      A line for each that differs.

    Example:
      >>> identity_changes({"tokenizer": "aa"}, {"tokenizer": "bb"})
      ['the tokenizer has changed: its checksum was aa, now bb']
    """
    if not isinstance(then, dict):
        return []
    return [
        f"the {name} ha{'ve' if name.endswith('s') else 's'} changed: "
        f"{'their' if name.endswith('s') else 'its'} checksum was {then[name]}, now {value}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]


def _chat_templates(folder: Path, settings: dict[str, Any]) -> Any:
    """Return the folder's templates; a single one as it is in the settings."""
    files = template_files(folder)
    default = files.pop(DEFAULT, None) or settings.get("chat_template")
    if default is None:
        default = _read(folder / "chat_template.json").get("chat_template")
    return [default, files] if files else default


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, ModelError) if file.is_file() else {}
