"""The tokens that a folder adds to the vocabulary of its tokenizer, special tokens included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.data.special_tokens import (
    ROLES,
    SETTINGS,
    all_special_tokens,
    read_settings,
    read_special_tokens,
    text_of,
)
from jax_lora.storage import schema

Document = dict[str, Any]

_ID = schema.integer(0, 2**31 - 1)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_TOKEN = schema.fields(
    {"content": schema.TEXT, **dict.fromkeys(_FLAGS, schema.BOOLEAN)}, required=("content",)
)
_TOKENS = schema.optional(schema.list_of(schema.either(schema.TEXT, _TOKEN)))
_SETTINGS = schema.fields(
    {
        "added_tokens_decoder": schema.object_of(_TOKEN),
        "additional_special_tokens": _TOKENS,
        **dict.fromkeys(ROLES, schema.optional(schema.either(schema.TEXT, _TOKEN))),
    }
)
_IDS = schema.object_of(_ID)


def special_tokens_of(folder: Path, vocabulary: Mapping[str, int]) -> dict[str, str]:
    """Return special tokens by role: those a folder names, and usual ones of the vocabulary."""
    found = all_special_tokens(folder)
    named = read_special_tokens(folder)
    return {role: text for role, text in found.items() if role in named or text in vocabulary}


def read_added_tokens(
    folder: Path, vocabulary: Mapping[str, int], more: tuple[str, ...] = ()
) -> list[Document]:
    """List the tokens that are found in a text before it is split, in the format of tokenizer.json.

    The special tokens of the folder and `more` are among them. They are in the order of their ids;
    a token without an id gets the next one.

    Raises:
      ModelError: A file is damaged.
    """
    settings = read_settings(folder / SETTINGS, _SETTINGS)
    mapped = read_settings(folder / "special_tokens_map.json", _SETTINGS) | settings
    named = [mapped.get(role) for role in ROLES]
    named += [*(mapped.get("additional_special_tokens") or []), *more]
    named += special_tokens_of(folder, vocabulary).values()
    tokens: dict[str, Document] = {}
    for each in named:
        text = text_of(each)
        if text is not None and text not in tokens:
            flags = each if isinstance(each, dict) else {}
            tokens[text] = {"content": text} | _flags(flags) | {"special": True}
    ids = dict(read_settings(folder / "added_tokens.json", _IDS))
    for index, each in settings.get("added_tokens_decoder", {}).items():
        special = each["content"] in tokens or bool(each.get("special"))
        tokens[each["content"]] = {"content": each["content"], **_flags(each), "special": special}
        ids[each["content"]] = int(index) if index.isdecimal() else -1
    for text in ids:
        tokens.setdefault(text, {"content": text} | _flags({}))
    behind = max([*vocabulary.values(), *ids.values()], default=-1) + 1
    for text, token in tokens.items():
        index = vocabulary.get(text, ids.get(text))
        token["id"] = behind if index is None else index
        behind += index is None
    return sorted(tokens.values(), key=lambda token: token["id"])


def _flags(token: Mapping[str, Any]) -> Document:
    return {name: token.get(name, False) for name in _FLAGS}
