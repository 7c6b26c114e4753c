"""The rows of a file as examples of the right length, and what was lost on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jax_lora.data.encoding import Encoded, encode_row
from jax_lora.data.rows import RowFile
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError, format_error


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Args:
      ids: (tokens,) int32.
      learned: (tokens,) booleans: True where the token is one to predict.
      line: The row's line in its file.
      raw: Tokens of the row's own text, without template, start and end tokens.
    """

    ids: np.ndarray
    learned: np.ndarray
    line: int
    raw: int = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """The rows of a file as examples, and what was lost on the way.

    Args:
      rows: The examples.
      cut: How many rows were cut at the longest length.
      dropped: Lines of the rows left out because nothing to learn was left of them.
      unlocated: Answers that are not learned, as the chat template writes them as other texts.
      pieces: Examples that documents longer than the longest length were cut into.
    """

    rows: tuple[Example, ...]
    cut: int = 0
    dropped: tuple[int, ...] = ()
    unlocated: int = 0
    pieces: int = 0


def make_examples(
    file: RowFile,
    tokenizer: Tokenizer,
    *,
    max_length: int = 2048,
    truncate: str = "right",
    mask_prompt: bool | None = None,
    turns: str = "all",
) -> Examples:
    """Encode every row of a file.

    The end token is appended where it is not there yet, and learned. Prompts, and every turn of a
    chat but the assistant's, are seen and not learned.

    Args:
      file: The rows.
      tokenizer: The model's tokenizer.
      max_length: Longest row in tokens.
      truncate: What happens to longer ones: `"right"` cuts them, `"drop"` leaves them out, and
        `"error"` refuses the file. Documents of a folder of texts are cut into pieces instead.
      mask_prompt: False learns prompts too; None follows the format (True, but for text).
      turns: Which of a chat's answers are learned: `"all"` or the `"last"`.

    Returns:
      The examples, in the file's order.

    Raises:
      DataError: `truncate="error"` and a long row, or no row is left.
    """
    examples: list[Example] = []
    dropped: list[int] = []
    cut = unlocated = pieces = 0
    for row in file.rows:
        try:
            encoded = encode_row(row, tokenizer, mask_prompt=mask_prompt, turns=turns)
        except DataError as error:
            raise DataError(f"{file.path}:{row.line}: {error}") from error
        unlocated += encoded.unlocated
        whole = _example(encoded, row.line)
        if len(whole.ids) <= max_length:
            kept = [whole]
        elif row.kind == "document":
            kept = list(_pieces(whole, max_length))
            pieces += len(kept)
        elif truncate == "error":
            where = f"{file.path}:{row.line}"
            raise DataError(_too_long(where, len(whole.ids), max_length))
        else:
            cut += truncate == "right"
            kept = [_part(whole, 0, max_length if truncate == "right" else 0)]
        # The first token is never predicted, so it cannot be all there is to learn.
        useful = [example for example in kept if example.learned[1:].any()]
        examples += useful
        dropped += [] if useful else [row.line]
    if not examples:
        raise DataError(
            format_error(
                str(file.path),
                got=f"{len(dropped)} rows, of which none has a token to learn within {max_length}",
                expected="at least one",
                fix="Raise --max-seq-length, or shorten the prompts.",
            )
        )
    return Examples(tuple(examples), cut, tuple(dropped), unlocated, pieces)


def _example(encoded: Encoded, line: int) -> Example:
    ids, learned = np.asarray(encoded.ids, np.int32), np.asarray(encoded.learned, bool)
    return Example(ids, learned, line, encoded.raw)


def _pieces(example: Example, length: int) -> Iterator[Example]:
    """Cut a document; a piece begins with the last token of the one before, to predict the next."""
    for start in range(0, len(example.ids) - 1, length - 1):
        yield _part(example, start, start + length)


def _part(example: Example, start: int, stop: int) -> Example:
    ids = example.ids[start:stop]
    raw = min(example.raw, max(len(ids) - (start > 0), 0))
    return dataclasses.replace(example, ids=ids, learned=example.learned[start:stop], raw=raw)


def _too_long(where: str, length: int, max_length: int) -> str:
    return format_error(
        where,
        got=f"{length} tokens",
        expected=f"at most {max_length} (--max-seq-length)",
        fix="Raise --max-seq-length, or allow --truncate right or drop.",
    )
