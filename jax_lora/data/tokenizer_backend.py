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
from jax_lora.data.special_tokens import read_settings
from jax_lora.data.vocabulary_files import byte_level_document, word_piece_document
from jax_lora.errors import DataError, LoraError, ModelError, format_error
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
_TEXTS = schema.optional(schema.TEXT)
_VOCABULARY = schema.Kind("an object, or a list", lambda value: isinstance(value, dict | list))
_DOCUMENT = schema.fields(
    {
        "model": schema.fields(
            {
                "type": _TEXTS,
                "vocab": _VOCABULARY,
                "merges": _MERGES,
                "unk_token": _TEXTS,
                "continuing_subword_prefix": _TEXTS,
                "end_of_word_suffix": _TEXTS,
            },
            required=("vocab",),
        ),
        "added_tokens": schema.list_of(_ADDED),
        "pre_tokenizer": schema.optional(schema.OBJECT),
        "normalizer": schema.optional(schema.OBJECT),
        "post_processor": schema.optional(schema.OBJECT),
        "decoder": schema.optional(schema.OBJECT),
    },
    required=("model",),
)
_INDEX = schema.integer(0, _LARGEST_ID)
_VOCAB_SIZE = {"vocab_size": schema.optional(schema.integer(1, _LARGEST_ID))}
# The text part of a multimodal model has a configuration of its own.
_MODEL_SIZE = schema.fields(
    _VOCAB_SIZE | {"text_config": schema.optional(schema.fields(_VOCAB_SIZE))}
)
_MODEL_EOS = schema.fields(
    {"eos_token_id": schema.optional(schema.either(_INDEX, schema.list_of(_INDEX)))}
)


def tokenizer_file(folder: Path) -> Path | None:
    """Return the file of a folder that has its vocabulary, or None."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def read_document(folder: Path) -> dict[str, Any]:
    """Read what a folder's tokenizer is, in the format of tokenizer.json.

    Args:
      folder: The folder, with one of `tokenizer.json`, `tokenizer.model` or `spiece.model`
        (SentencePiece), `vocab.json` and `merges.txt`, or `vocab.txt`.

    Returns:
      The tokenizer.

    Raises:
      ModelError: No such file is there, or it is damaged.
    """
    file = tokenizer_file(folder)
    if file is None:
        raise _refusal(folder / FILE, "no such file")
    return _FILES[file.name](file)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read a folder's tokenizer, with truncation and padding switched off.

    Args:
      folder: The folder, as for `read_document`.

    Returns:
      The tokenizer.

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
    if file.name != FILE:
        _check_ids(file, document, backend)
    return backend


def _check_ids(file: Path, document: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Raise if an added token has another id than its file says: the library counts on."""
    for token in document["added_tokens"]:
        text, index = token["content"], backend.token_to_id(token["content"])
        if index != token["id"]:
            raise _refusal(file, f"the added token {text[:40]!r} with the id {token['id']}")


@contextlib.contextmanager
def library_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of the tokenizers library, Rust's panics included.

    Args:
      folder: The tokenizer's folder, for the message.

    Yields:
      Nothing.

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


def eos_of_model(folder: Path, backend: tokenizers.Tokenizer) -> str | None:
    """Return the text of the EOS token in config.json, the first if there are several.

    Args:
      folder: The folder.
      backend: Its tokenizer.

    Returns:
      The text, or None.

    Raises:
      ModelError: The file is damaged.
    """
    index = read_settings(folder / "config.json", _MODEL_EOS).get("eos_token_id")
    index = (index[0] if index else None) if isinstance(index, list) else index
    return None if index is None else backend.id_to_token(index)


def embedded_tokens(folder: Path) -> int | None:
    """Return how many tokens have an embedding, from the folder's `config.json` if it has one.

    Args:
      folder: The folder.

    Returns:
      The number, or None.

    Raises:
      ModelError: The file is damaged.
    """
    settings = read_settings(folder / "config.json", _MODEL_SIZE)
    return settings.get("vocab_size") or (settings.get("text_config") or {}).get("vocab_size")


def check_embedded(ids: list[int], embedded: int | None, backend: tokenizers.Tokenizer) -> None:
    """Raise if a token is behind the end of the model's embedding table.

    Some tokenizers name tokens that their model does not have, such as Gemma 3's image token.

    Args:
      ids: The tokens of a text.
      embedded: From `embedded_tokens`.
      backend: The tokenizer.

    Raises:
      DataError: A token has no embedding.
    """
    if embedded is not None and ids and max(ids) >= embedded:
        index = max(ids)
        raise DataError(
            format_error(
                "the tokens",
                got=f"{backend.id_to_token(index)!r}, token {index}",
                expected=f"tokens with an embedding, from 0 to {embedded - 1}",
                fix="Remove this token from the text: the model has no embedding for it.",
            )
        )


def check_special(
    folder: Path,
    role: str,
    index: int | None,
    embedded: int | None,
    backend: tokenizers.Tokenizer,
) -> None:
    """Raise if a token that is added to every example is behind the model's embedding table.

    Args:
      folder: The folder of the tokenizer and of the model.
      role: Its role: "bos", "eos" or "mask".
      index: The token, or None.
      embedded: How many tokens have an embedding, or None if that is unknown.
      backend: The tokenizer.

    Raises:
      ModelError: The token has no embedding.
    """
    if embedded is not None and index is not None and index >= embedded:
        raise ModelError(
            format_error(
                f"{folder}: {role}_token",
                got=f"{backend.id_to_token(index)!r}, token {index}",
                expected=f"a token with an embedding in the model, from 0 to {embedded - 1}: it is "
                "added to every example",
                fix=f'Name another token as "{role}_token" in tokenizer_config.json, or extend the '
                "embedding table of the model.",
            )
        )


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
        format_error(
            str(file),
            got=got,
            expected="a tokenizer in the format of the tokenizers library, a SentencePiece model, "
            "vocab.json with merges.txt, or vocab.txt",
            fix="Copy tokenizer.json, or these files, from the model's own folder.",
        )
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
