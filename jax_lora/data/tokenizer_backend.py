"""Read a folder's tokenizer files, and convert the errors of the tokenizers library.

The library is written in Rust. A file with contradictions makes it panic, and a panic is a
`BaseException` in Python, with a stack trace on stderr. The known contradictions are therefore
found before the library reads the file, and every other error is converted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_lora.errors import DataError, LoraError, ModelError, format_error
from jax_lora.storage import schema
from jax_lora.storage.json_files import parse_object, read_json, read_limited

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
_TOKEN = schema.optional(
    schema.either(schema.TEXT, schema.fields({"content": schema.TEXT}, required=("content",)))
)
_TOKEN_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SPECIAL = schema.fields(dict.fromkeys(_TOKEN_ROLES, _TOKEN))
_INDEX = schema.integer(0, _LARGEST_ID)
_MODEL_SIZE = schema.fields({"vocab_size": schema.optional(schema.integer(1, _LARGEST_ID))})
_MODEL_EOS = schema.fields(
    {"eos_token_id": schema.optional(schema.either(_INDEX, schema.list_of(_INDEX)))}
)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read a folder's `tokenizer.json`, with truncation and padding switched off.

    Args:
      folder: The folder.

    Returns:
      The tokenizer.

    Raises:
      ModelError: The file is missing, damaged, or contradicts itself.
    """
    import tokenizers

    file = folder / FILE
    if not file.is_file():
        raise _refusal(file, "no such file")
    data = read_limited(file, ModelError, "tokenizer_bytes")
    document = parse_object(data, file, ModelError)
    problems = list(schema.problems(document, _DOCUMENT)) or list(_contradictions(document))
    if problems:
        raise _refusal(file, problems[:_SHOWN_PROBLEMS])
    with library_errors(folder):
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
    return backend


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
        raise _refusal(folder / FILE, got) from error


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Read the texts of the special tokens that a folder names, by role such as `"eos_token"`.

    Args:
      folder: The folder.

    Returns:
      The texts by role.

    Raises:
      ModelError: A file is damaged, or a token is not a text.
    """
    settings = _settings(folder / "special_tokens_map.json", _SPECIAL)
    settings |= _settings(folder / "tokenizer_config.json", _SPECIAL)
    texts = {name: _text_of(settings.get(name)) for name in _TOKEN_ROLES}
    return {name: text for name, text in texts.items() if text is not None}


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
    index = _settings(folder / "config.json", _MODEL_EOS).get("eos_token_id")
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
    return _settings(folder / "config.json", _MODEL_SIZE).get("vocab_size")


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


def _settings(file: Path, kind: schema.Kind) -> dict[str, Any]:
    if not file.is_file():
        return {}
    settings = read_json(file, ModelError)
    problems = list(schema.problems(settings, kind))
    if problems:
        raise ModelError(
            format_error(
                str(file),
                got=problems[:_SHOWN_PROBLEMS],
                expected="a JSON object of settings",
                fix="Copy the file from the model's own folder.",
            )
        )
    return settings


def _text_of(token: Any) -> str | None:
    """Return a special token's text: settings write it as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _refusal(file: Path, got: str | list[str]) -> ModelError:
    return ModelError(
        format_error(
            str(file),
            got=got,
            expected="a tokenizer in the format of the tokenizers library",
            fix="Copy tokenizer.json from the model's own folder.",
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
