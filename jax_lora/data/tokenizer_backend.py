"""Read a folder's tokenizer files, and convert the errors of the tokenizers library.

The library is written in Rust. A file with contradictions makes it panic, and a panic is a
`BaseException` in Python, with a stack trace on stderr. The known contradictions are therefore
found before the library reads the file, and every other error is converted.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_lora.data.regex_trial import regex_problem
from jax_lora.data.sentencepiece_tokenizer import sentencepiece_document
from jax_lora.data.vocabulary_files import byte_level_document, word_piece_document
from jax_lora.errors import LoraError, ModelError
from jax_lora.storage import schema
from jax_lora.storage.json_files import parse_object, read_limited

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
_SHOWN_PROBLEMS = 5
_LARGEST_ID = 2**31 - 1
_MOST_GROWTH = 10_000

_ID = schema.integer(0, _LARGEST_ID)
_PIECES = schema.list_of(schema.TEXT, 2)
_MERGES = schema.list_of(schema.either(schema.TEXT, _PIECES))
_ADDED = schema.fields({"id": _ID, "content": schema.TEXT}, required=("id", "content"))
_TEXT = schema.optional(schema.TEXT)
_TEXTS = ("type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
_STEPS = ("pre_tokenizer", "normalizer", "post_processor", "decoder")
_VOCABULARY = schema.Kind("an object, or a list", lambda value: isinstance(value, dict | list))
_DOCUMENT = schema.fields(
    {
        "model": schema.fields(
            {"vocab": _VOCABULARY, "merges": _MERGES, **dict.fromkeys(_TEXTS, _TEXT)},
            required=("vocab",),
        ),
        "added_tokens": schema.list_of(_ADDED),
        **dict.fromkeys(_STEPS, schema.optional(schema.OBJECT)),
    },
    required=("model",),
)


def tokenizer_file(folder: Path) -> Path | None:
    """Return the file of a folder that has its vocabulary, or None."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def read_document(folder: Path) -> dict[str, Any]:
    """Read what a folder's tokenizer is, in the format of tokenizer.json.

    The folder has one of `tokenizer.json`, `tokenizer.model` or `spiece.model` (SentencePiece),
    `vocab.json` and `merges.txt`, or `vocab.txt`.

    Raises:
      ModelError: No such file is there, or it is damaged.
    """
    file = tokenizer_file(folder)
    if file is None:
        raise _refusal(folder / FILE, "no such file")
    return _FILES[file.name](file)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read a folder's tokenizer, with truncation and padding switched off.

    Raises:
      ModelError: A file is missing, damaged, or contradicts itself.
    """
    import tokenizers

    document, file = read_document(folder), tokenizer_file(folder) or folder
    problems = list(schema.problems(document, _DOCUMENT)) or list(_contradictions(document))
    if problems:
        raise _refusal(file, problems[:_SHOWN_PROBLEMS])
    if problem := regex_problem(document):
        raise _refusal(file, problem)
    with library_errors(folder):
        backend = tokenizers.Tokenizer.from_str(json.dumps(document))
        backend.no_truncation()
        backend.no_padding()
    # The library counts on: an added token may get another id than its file says.
    for token in document["added_tokens"] if file.name != FILE else ():
        text, index = token["content"], token["id"]
        if backend.token_to_id(text) != index:
            raise _refusal(file, f"the added token {text[:40]!r} with the id {index}")
    return backend


@contextlib.contextmanager
def library_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of the tokenizers library, Rust's panics included.

    Raises:
      ModelError: The block raised an error.
    """
    try:
        yield
    except (LoraError, KeyboardInterrupt, SystemExit, GeneratorExit, TimeoutError, MemoryError):
        raise
    except BaseException as error:  # a panic is a BaseException, of a class that is not public
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise _refusal(tokenizer_file(folder) or folder, got) from error


def _tokenizer_json(file: Path) -> dict[str, Any]:
    return parse_object(read_limited(file, ModelError, "tokenizer_bytes"), file, ModelError)


# In the order in which they are looked for.
_FILES: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    FILE: _tokenizer_json,
    "tokenizer.model": sentencepiece_document,
    "spiece.model": sentencepiece_document,
    "vocab.json": byte_level_document,
    "vocab.txt": word_piece_document,
}


def _refusal(file: Path, got: str | list[str]) -> ModelError:
    return ModelError(
        str(file),
        got=got,
        expected="a tokenizer in the format of the tokenizers library, a SentencePiece model, "
        "vocab.json with merges.txt, or vocab.txt",
        fix="Copy tokenizer.json, or these files, from the model's own folder.",
    )


# -----------------------------------------------------------------------------------------------
# Contradictions
# -----------------------------------------------------------------------------------------------


def _contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    """Find what makes the library panic."""
    model = document["model"]
    yield from _vocabulary_problems(model)
    yield from _merge_problems(model)
    yield from _growth_problems(document)
    for processor in _parts(document.get("post_processor"), "processors"):
        if processor.get("type") == "TemplateProcessing":
            yield from _template_problems(processor)


def _vocabulary_problems(model: Mapping[str, Any]) -> Iterator[str]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        for token, index in vocabulary.items():
            if not _ID.fits(index):
                yield f"model.vocab.{token[:40]} = {schema.shown(index)}: expected {_ID.expected}"


def _merge_problems(model: Mapping[str, Any]) -> Iterator[str]:
    """Check that both parts of every merge are tokens, and that the library can join them."""
    merges, vocabulary = model.get("merges") or [], model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    if not isinstance(vocabulary, dict):
        return
    for number, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        where = f"model.merges.{number} = {schema.shown(merge)}"
        if isinstance(merge, str) and merge.startswith("#version"):
            continue
        if len(parts) != 2:
            yield f"{where}: expected two tokens"
        elif not (parts[0] in vocabulary and parts[1] in vocabulary):
            yield f"{where}: expected two tokens of model.vocab"
        elif prefix and not parts[1].startswith(prefix):
            yield f"{where}: expected {schema.shown(prefix)} at the start of the second token"
        elif parts[0] + parts[1][len(prefix) :] not in vocabulary:
            yield f"{where}: expected the joined token in model.vocab"


def _growth_problems(document: Mapping[str, Any]) -> Iterator[str]:
    """Limit how much replacements lengthen a text: 30 doublings make a letter a gigabyte."""
    for role, name in (("normalizer", "normalizers"), ("decoder", "decoders")):
        parts = _parts(document.get(role), name)
        replacements = [part for part in parts if part.get("type") == "Replace"]
        if any(part.get("pattern") == {"String": ""} for part in replacements):
            yield f"{role}: a replacement of the empty text"
        contents = [part.get("content") for part in replacements]
        factor = math.prod(max(1, len(each)) for each in contents if isinstance(each, str))
        if factor > _MOST_GROWTH:
            yield f"{role}: replacements that lengthen a text up to {factor:.0e} times"


def _template_problems(processor: Mapping[str, Any]) -> Iterator[str]:
    tokens = processor.get("special_tokens")
    if not isinstance(tokens, dict):
        yield f"post_processor.special_tokens = {schema.shown(tokens)}: expected an object"
        return
    for template in ("single", "pair"):
        pieces = processor.get(template)
        for piece in pieces if isinstance(pieces, list) else ():
            special = piece.get("SpecialToken") if isinstance(piece, dict) else None
            name = special.get("id") if isinstance(special, dict) else None
            if name is not None and not (isinstance(name, str) and name in tokens):
                yield (
                    f"post_processor.{template}: {schema.shown(name)} is not in "
                    "post_processor.special_tokens"
                )


def _parts(value: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield a component of the tokenizer, and those in a sequence of them."""
    if isinstance(value, dict):
        yield value
        inner = value.get(name)
        for each in inner if isinstance(inner, list) else ():
            yield from _parts(each, name)
