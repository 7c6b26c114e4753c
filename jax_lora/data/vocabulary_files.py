"""Describe tokenizers of `vocab.json` and `merges.txt`, and of `vocab.txt`, as tokenizer.json."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from jax_lora.data.added_tokens import read_added_tokens, special_tokens_of
from jax_lora.data.post_processor import template_processing
from jax_lora.data.special_tokens import SETTINGS, read_settings, tokenizer_kind
from jax_lora.errors import ModelError
from jax_lora.storage import schema
from jax_lora.storage.json_files import read_json, read_limited

Document = dict[str, Any]

_BYTE_LEVEL = ("GPT2", "Roberta", "CodeGen", "Qwen2")
_WORD_PIECE = ("Bert", "DistilBert", "Electra", "MobileBert")
# How Qwen splits a text into words; GPT-2's pattern is that of the tokenizers library.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FLAG = schema.optional(schema.BOOLEAN)
_FLAGS = (
    "add_bos_token",
    "add_prefix_space",
    "do_lower_case",
    "do_basic_tokenize",
    "strip_accents",
    "tokenize_chinese_chars",
)
_IDS = schema.object_of(schema.integer(0, 2**31 - 1))
_SHOWN_PROBLEMS = 5
_SETTINGS = schema.fields(dict.fromkeys(_FLAGS, _FLAG))


def byte_level_document(file: Path) -> Document:
    """Describe the byte-level BPE of a folder with `vocab.json` and `merges.txt`.

    Raises:
      ModelError: A file is missing or damaged, or the tokenizer is of another class.
    """
    folder = file.parent
    kind = _kind(file, _BYTE_LEVEL)
    vocabulary = read_json(file, ModelError, "tokenizer_bytes")
    if problems := list(islice(schema.problems(vocabulary, _IDS), _SHOWN_PROBLEMS)):
        raise _damaged(file, problems)
    lines = _lines(folder / "merges.txt")
    lines = lines[1:] if lines[:1] and lines[0].startswith("#version") else lines
    settings = read_settings(folder / SETTINGS, _SETTINGS)
    space = bool(settings.get("add_prefix_space"))
    special = special_tokens_of(folder, vocabulary)
    level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True}
    added = read_added_tokens(folder, vocabulary)
    document: Document = {
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [line.split(" ") for line in lines if line.strip()],
        },
        "added_tokens": added,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
    }
    if kind == "Qwen2":
        split = {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated"}
        parts = [{**split, "invert": False}, {**level, "use_regex": False}]
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        document["normalizer"] = {"type": "NFC"}
    elif kind == "Roberta":
        for token in added:  # as the class does, unless the settings say otherwise
            token["lstrip"] |= token["content"] == special.get("mask_token")
        ends = {name: _end(special, f"{name}_token", vocabulary, file) for name in ("sep", "cls")}
        document["post_processor"] = {
            "type": "RobertaProcessing",
            **{name: (text, vocabulary[text]) for name, text in ends.items()},
            "trim_offsets": True,
            "add_prefix_space": space,
        }
    elif settings.get("add_bos_token"):
        bos = _end(special, "bos_token", vocabulary, file)
        document["post_processor"] = template_processing([bos], [], vocabulary)
    return document


def word_piece_document(file: Path) -> Document:
    """Describe the WordPiece tokenizer of a folder with `vocab.txt`.

    Raises:
      ModelError: A file is damaged, or the tokenizer is of another class.
    """
    folder = file.parent
    _kind(file, _WORD_PIECE)
    lines = _lines(file)
    vocabulary = {
        token: index for index, token in enumerate(lines[:-1] if not lines[-1] else lines)
    }
    settings = read_settings(folder / SETTINGS, _SETTINGS)
    if settings.get("do_basic_tokenize") is False:
        raise _unsupported(file, "do_basic_tokenize=false")
    usual = {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    special = usual | special_tokens_of(folder, vocabulary)
    sep, cls = (_end(special, f"{name}_token", vocabulary, file) for name in ("sep", "cls"))
    return {
        "model": {
            "type": "WordPiece",
            "unk_token": special["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
        "added_tokens": read_added_tokens(folder, vocabulary),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars") is not False,
            "strip_accents": settings.get("strip_accents"),
            "lowercase": settings.get("do_lower_case") is not False,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template_processing([cls], [sep], vocabulary, before_second=False),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }


def _kind(file: Path, supported: tuple[str, ...]) -> str | None:
    kind = tokenizer_kind(file.parent)
    if kind is not None and kind not in supported:
        raise _unsupported(file, f"the tokenizer class {kind}Tokenizer")
    return kind


def _lines(file: Path) -> list[str]:
    """Return the lines of a text; only a newline ends one, as other separators are tokens."""
    try:
        text = read_limited(file, ModelError, "tokenizer_bytes").decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(file, str(error)) from error
    return text.replace("\r\n", "\n").split("\n")


def _end(special: dict[str, str], role: str, vocabulary: dict[str, int], file: Path) -> str:
    """Return a special token that is put around a text."""
    text = special.get(role)
    if text is None or text not in vocabulary:
        raise _damaged(file, f"no {role} ({text!r}) among its {len(vocabulary):,} tokens")
    return text


def _damaged(file: Path, got: str | list[str]) -> ModelError:
    return ModelError(
        str(file),
        got=got,
        expected="the vocabulary of a tokenizer",
        fix="Copy the file, or tokenizer.json, from the model's own folder.",
    )


def _unsupported(file: Path, got: str) -> ModelError:
    return ModelError(
        str(file),
        got=got,
        expected=f"tokenizer.json, or one of {', '.join((*_BYTE_LEVEL, *_WORD_PIECE))}",
        fix="Copy tokenizer.json from the model's own folder, or write it: load the folder "
        "with AutoTokenizer of transformers, and call its save_pretrained.",
    )
