"""Read a SentencePiece model: its pieces, and how it normalizes text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from jax_lora.data.protobuf import message_fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_MOST_PIECES = 2_000_000
_MOST_SYMBOLS = 10_000  # user-defined ones: they become one regular expression
_LONGEST_PIECE = 1000  # characters
_MOST_CHARACTERS = 20_000_000  # of all pieces: every split of a piece may be a merge
_LONGEST_REPLACEMENT = 1000  # bytes that a character may become


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token.

    Args:
      text: Its text; a space is `▁`.
      score: Log probability, or the order of merges.
      kind: `NORMAL`, `UNKNOWN`, `CONTROL`, `USER_DEFINED`, `UNUSED` or `BYTE`.
    """

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model.

    Args:
      pieces: The tokens by id.
      kind: `UNIGRAM` or `BPE`.
      byte_fallback: Unknown characters become the tokens of their bytes.
      unk: Text of the unknown token.
      bos: Text of the BOS token, or None.
      eos: Text of the EOS token, or None.
      charsmap: The compiled replacements of characters, or `b""`.
      add_dummy_prefix: A space is put before the text.
      remove_extra_whitespaces: Spaces at the ends and repeated ones are removed.
    """

    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    unk: str
    bos: str | None
    eos: str | None
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Parse the content of a `tokenizer.model`.

    Raises:
      ValueError: It is not a SentencePiece model, or of a kind that is not supported.
    """
    pieces: list[Piece] = []
    parts: dict[int, list[memoryview]] = {2: [], 3: []}
    for number, value in message_fields(memoryview(data)):
        if number == 1:
            pieces.append(_piece(_message(value), len(pieces)))
            if len(pieces) > _MOST_PIECES:
                raise ValueError(f"more than {_MOST_PIECES:,} pieces")
        elif number in parts:
            parts[number].append(_message(value))
    _check_pieces(pieces)
    # Messages that occur several times are merged, as if they were one after the other.
    trainer, normalizer = (_scalars(memoryview(b"".join(parts[number]))) for number in (2, 3))
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise ValueError(f"a model of the type {kind}; unigram (1) and BPE (2) are supported")
    if trainer.get(24, 0):
        raise ValueError("treat_whitespace_as_suffix, which is not supported")
    if not normalizer.get(5, 1):
        raise ValueError("escape_whitespaces=false, which is not supported")
    charsmap = bytes(_message(normalizer.get(2, memoryview(b""))))
    _check_charsmap(charsmap)
    return SentencePieceModel(
        tuple(pieces),
        kind,
        byte_fallback=bool(trainer.get(35, 0)),
        unk=next(piece.text for piece in pieces if piece.kind == UNKNOWN),
        bos=_text_at(pieces, trainer.get(41, 1)),
        eos=_text_at(pieces, trainer.get(42, 2)),
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _check_pieces(pieces: list[Piece]) -> None:
    """Check the number of pieces of each kind, and that their texts differ."""
    if not pieces:
        raise ValueError("no pieces")
    unknown = sum(piece.kind == UNKNOWN for piece in pieces)
    if unknown != 1:
        raise ValueError(f"{unknown} unknown tokens instead of one")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError("two pieces with the same text")
    symbols = sum(piece.kind == USER_DEFINED for piece in pieces)
    if symbols > _MOST_SYMBOLS:
        raise ValueError(f"{symbols:,} user-defined symbols, more than {_MOST_SYMBOLS:,}")
    characters = sum(len(piece.text) for piece in pieces)
    if characters > _MOST_CHARACTERS:
        raise ValueError(f"pieces of {characters:,} characters, more than {_MOST_CHARACTERS:,}")


def _piece(data: memoryview, index: int) -> Piece:
    fields = _scalars(data)
    try:
        text = str(_message(fields.get(1, memoryview(b""))), "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"piece {index}: {error}") from error
    score, kind = fields.get(2, 0.0), fields.get(3, NORMAL)
    if not text:
        raise ValueError(f"piece {index} without a text")
    if len(text) > _LONGEST_PIECE:
        raise ValueError(f"piece {index} of {len(text):,} characters")
    if not isinstance(score, float) or not math.isfinite(score):
        raise ValueError(f"piece {index} with the score {score!r:.40}")
    if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
        raise ValueError(f"piece {index} of the type {kind!r:.40}")
    return Piece(text, score, kind)


def _scalars(data: memoryview) -> dict[int, Any]:
    return dict(message_fields(data))  # the last value of a field counts


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError(f"the number {value} instead of a message")
    return value


def _text_at(pieces: list[Piece], index: Any) -> str | None:
    """Return the text of a special token; -1 is written for one that does not exist."""
    return pieces[index].text if isinstance(index, int) and index < len(pieces) else None


def _check_charsmap(data: bytes) -> None:
    """Check the two parts of the replacements: a trie after its size, and texts that end with 0."""
    if not data:
        return
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or size > len(data) - 4:
        raise ValueError("precompiled_charsmap: a trie of another size than it says")
    texts = data[4 + size :]
    longest = max((len(text) for text in re.split(b"\0", texts)), default=0)
    if longest > _LONGEST_REPLACEMENT:
        raise ValueError(f"precompiled_charsmap: a replacement of {longest:,} bytes")
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"precompiled_charsmap: {error}") from error


def merges_of(model: SentencePieceModel) -> Iterator[list[str]]:
    """Yield the pairs that a BPE model merges: every split of a normal token into two of them.

    The tokens with the highest scores are merged first.
    """
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    for text in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                yield [text[:cut], text[cut:]]
