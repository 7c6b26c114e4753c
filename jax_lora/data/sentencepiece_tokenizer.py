"""Describe a tokenizer of a SentencePiece model in the format of tokenizer.json."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from jax_lora.data.added_tokens import read_added_tokens
from jax_lora.data.post_processor import template_processing
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
from jax_lora.errors import ModelError
from jax_lora.storage import schema
from jax_lora.storage.json_files import read_limited

Document = dict[str, Any]

_SPACE = "▁"
_EXTRA_IDS = 100  # of T5
_FLAG = schema.optional(schema.BOOLEAN)
_SETTINGS = schema.fields(
    {
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), _FLAG),
        "extra_ids": schema.optional(schema.integer(0, 10_000)),
    }
)


def sentencepiece_document(file: Path) -> Document:
    """Describe the tokenizer of a folder with a `tokenizer.model` or `spiece.model`.

    Raises:
      ModelError: The file is damaged, or of a kind that is not supported.
    """
    try:
        model = parse_sentencepiece(read_limited(file, ModelError, "tokenizer_bytes"))
    except ValueError as error:
        raise ModelError(
            str(file),
            got=str(error)[:200],
            expected="a SentencePiece model, of the type unigram or BPE",
            fix="Copy the file, or tokenizer.json, from the model's own folder.",
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

    def end(name: str, usual: str | None, is_usual: bool) -> list[str]:
        adds = settings.get(f"add_{name}_token")
        text = named.get(f"{name}_token", usual)
        is_added = is_usual if adds is None else adds
        return [text] if is_added and text is not None and text in vocabulary else []

    before, after = end("bos", model.bos, not is_t5), end("eos", model.eos, is_t5)
    return template_processing(before, after, vocabulary) if before or after else None


def _is_t5(folder: Path) -> bool:
    return tokenizer_kind(folder) in ("T5", "MT5", "UMT5")


def _replace(pattern: Document, content: str) -> Document:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(name: str, parts: list[Document]) -> Document | None:
    return {"type": "Sequence", name: parts} if parts else None
