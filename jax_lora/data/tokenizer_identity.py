"""Digests of what turns text into ids, by which a checkpoint recognizes its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.errors import ModelError, format_error
from jax_lora.storage.json_files import digest

# Texts are cut and padded by the library itself, whatever these settings of the file are.
_UNUSED = ("truncation", "padding")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "mask_token", "add_bos_token", "add_eos_token")


def tokenizer_identity(folder: Path, end_ids: Any) -> dict[str, str]:
    """Hash the tokenizer, its special tokens, the chat template and the end tokens of a model.

    Args:
      folder: The model's folder.
      end_ids: Token ids at which the model stops: an id, several, or None.

    Returns:
      Digests by what they are of.

    Raises:
      ModelError: A file is damaged.
    """
    tokenizer = _read(folder / "tokenizer.json") or {}
    special = _read(folder / "special_tokens_map.json") or {}
    settings = special | (_read(folder / "tokenizer_config.json") or {})
    ends = [end_ids] if isinstance(end_ids, int) else sorted(end_ids or ())
    return {
        "tokenizer": digest({k: v for k, v in tokenizer.items() if k not in _UNUSED}),
        "special tokens": digest({name: _text(settings.get(name)) for name in _SPECIAL}),
        "chat template": digest(_chat_template(folder, settings)),
        "end-of-text token ids": digest([int(each) for each in ends]),
    }


def identity_changes(then: Any, now: Mapping[str, str]) -> list[str]:
    """Compare the digests of a checkpoint with those of a model.

    Args:
      then: Those of the checkpoint; earlier versions wrote none, which says nothing.
      now: From `tokenizer_identity`.

    Returns:
      A line for each that differs.

    Example:
      >>> identity_changes({"tokenizer": "aa"}, {"tokenizer": "bb"})
      ['the tokenizer has changed: its digest was aa, now bb']
    """
    if not isinstance(then, dict):
        return []
    return [
        f"the {name} ha{'ve' if name.endswith('s') else 's'} changed: "
        f"{'their' if name.endswith('s') else 'its'} digest was {then[name]}, now {value}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    """Return the template that transformers uses: a file of its name comes before the settings."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise _damaged(file, error) from error
    if settings.get("chat_template") is not None:
        return settings["chat_template"]
    return (_read(folder / "chat_template.json") or {}).get("chat_template")


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    return value if isinstance(value, dict) else None


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(
        format_error(
            str(file),
            got=str(error)[:200],
            expected="a file of a tokenizer, in UTF-8",
            fix="Copy the file from the model's own folder.",
        )
    )
