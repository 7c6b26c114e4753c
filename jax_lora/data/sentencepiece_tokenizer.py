"""Describe a tokenizer of a SentencePiece model in the format of tokenizer.json."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from jax_lora.data.added_tokens import read_added_tokens
from jax_lora.data.sentencepiece_model import (
    BPE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    merges_of,
    parse_sentencepiece,
)
from jax_lora.data.special_tokens import (
    SETTINGS,
    read_settings,
    read_special_tokens,
    tokenizer_kind,
)
from jax_lora.errors import ModelError, format_error
from jax_lora.storage import schema
from jax_lora.storage.json_files import read_limited

Document = dict[str, Any]

_SPACE = "▁"
_EXTRA_IDS = 100  # of T5
_FLAG = schema.optional(schema.BOOLEAN)
_SETTINGS = schema.fields(
    {
        "add_bos_token": _FLAG,
        "add_eos_token": _FLAG,
        "add_prefix_space": _FLAG,
        "legacy": _FLAG,
        "extra_ids": schema.optional(schema.integer(0, 10_000)),
    }
)


def sentencepiece_document(file: Path) -> Document:
    """Describe the tokenizer of a folder with a SentencePiece model.

    Args:
      file: The folder's `tokenizer.model` or `spiece.model`.

    Returns:
      The tokenizer, in the format of tokenizer.json.

    Raises:
      ModelError: The file is damaged, or of a kind that is not supported.
    """
    try:
        model = parse_sentencepiece(read_limited(file, ModelError, "tokenizer_bytes"))
    except ValueError as error:
        raise ModelError(
            format_error(
                str(file),
                got=str(error)[:200],
                expected="a SentencePiece model, of the type unigram or BPE",
                fix="Copy the file, or tokenizer.json, from the model's own folder.",
            )
        ) from error
    folder = file.parent
    settings = read_settings(folder / SETTINGS, _SETTINGS)
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    prefix = settings.get("add_prefix_space")
    prefix = model.add_dummy_prefix if prefix is None else prefix
    first_only = prefix and settings.get("legacy") is False
    return {
        "model": _bpe(model, vocabulary) if model.kind == BPE else _unigram(model, vocabulary),
        "added_tokens": read_added_tokens(folder, vocabulary, _special(model, folder, settings)),
        "normalizer": _sequence("normalizers", _normalizers(model, prefix and not first_only)),
        "pre_tokenizer": _sequence("pretokenizers", _pre_tokenizers(model, first_only)),
        "post_processor": _ends(model, folder, settings, vocabulary),
        "decoder": _sequence("decoders", _decoders(model, prefix)),
    }


def _unigram(model: SentencePieceModel, vocabulary: dict[str, int]) -> Document:
    return {
        "type": "Unigram",
        "unk_id": vocabulary[model.unk],
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel, vocabulary: dict[str, int]) -> Document:
    return {
        "type": "BPE",
        "unk_token": model.unk,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": any(_symbols(model)),  # they are tokens although nothing merges into them
        "vocab": vocabulary,
        "merges": list(merges_of(model)),
    }


def _special(model: SentencePieceModel, folder: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    kinds = (UNKNOWN, CONTROL)
    tokens = [piece.text for piece in model.pieces if piece.kind in kinds]
    if _is_t5(folder):
        extra = settings.get("extra_ids")
        count = _EXTRA_IDS if extra is None else extra
        tokens += [f"<extra_id_{index}>" for index in reversed(range(count))]
    return tuple(tokens)


def _symbols(model: SentencePieceModel) -> list[str]:
    """Return the user-defined symbols, the longest first: they are never split."""
    symbols = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _normalizers(model: SentencePieceModel, prefix: bool) -> list[Document]:
    parts: list[Document] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode("ascii")
        parts += [{"type": "Precompiled", "precompiled_charsmap": charsmap}]
    if model.remove_extra_whitespaces:
        parts += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    parts += [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    return [*parts, _replace({"String": " "}, _SPACE)]


def _pre_tokenizers(model: SentencePieceModel, first_only: bool) -> list[Document]:
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first"}
    parts: list[Document] = [metaspace | {"split": False}] if first_only else []
    if symbols := _symbols(model):
        pattern = {"Regex": "|".join(map(re.escape, symbols))}
        parts += [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    return parts


def _decoders(model: SentencePieceModel, prefix: bool) -> list[Document]:
    parts = [_replace({"String": _SPACE}, " ")]
    parts += [{"type": "ByteFallback"}] if model.byte_fallback else []
    parts += [{"type": "Fuse"}]
    return [*parts, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]


def _ends(
    model: SentencePieceModel, folder: Path, settings: dict[str, Any], vocabulary: dict[str, int]
) -> Document | None:
    """Return what puts BOS and EOS around a text: BOS for decoders, EOS for T5."""
    named, is_t5 = read_special_tokens(folder), _is_t5(folder)
    tokens = {
        "bos": named.get("bos_token", model.bos),
        "eos": named.get("eos_token", model.eos),
    }
    adds = {"bos": settings.get("add_bos_token"), "eos": settings.get("add_eos_token")}
    adds = {end: (end == "eos") == is_t5 if add is None else add for end, add in adds.items()}
    ends = {end: token for end, token in tokens.items() if adds[end] and token in vocabulary}
    if not ends:
        return None

    def around(*sequences: str) -> list[Document]:
        pieces: list[Document] = []
        for kind, name in enumerate(sequences):
            parts: list[Document] = [{"Sequence": {"id": name, "type_id": kind}}]
            special = {
                end: [{"SpecialToken": {"id": text, "type_id": kind}}] for end, text in ends.items()
            }
            pieces += [*special.get("bos", []), *parts, *special.get("eos", [])]
        return pieces

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A", "B"),
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary[text]], "tokens": [text]}
            for text in ends.values()
        },
    }


def _is_t5(folder: Path) -> bool:
    return tokenizer_kind(folder) in ("T5", "MT5", "UMT5")


def _replace(pattern: Document, content: str) -> Document:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(name: str, parts: list[Document]) -> Document | None:
    return {"type": "Sequence", name: parts} if parts else None
