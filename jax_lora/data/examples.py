"""Tokenize the examples of a file and apply the maximum sequence length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jax_lora.data.encoding import encode_row, renderings
from jax_lora.data.rows import Row, RowFile
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError

RENDERED_AHEAD = 64  # rows


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized example.

    Args:
      ids: (tokens,) int32.
      loss_mask: (tokens,) bool: True for target tokens.
      line: Line number in the file.
      raw: Number of tokens of the text itself, without template, BOS and EOS tokens.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    line: int
    raw: int = 0

    @property
    def targets(self) -> int:
        """Count the target tokens. The first token of a sequence is never a target."""
        return int(self.loss_mask[1:].sum())

    @property
    def tokens(self) -> int:
        """Count the tokens."""
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The tokenized examples of a file, with counts of truncated and dropped examples.

    Args:
      rows: The examples.
      cut: Number of truncated examples.
      dropped: Line numbers of the examples that were dropped, because no target token remained.
      unlocated: Number of responses without loss, because the chat template changes their text.
      pieces: Number of examples that long documents were split into.
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
    """Tokenize every example of a file.

    EOS is appended as a target token, unless it is already there. Prompts, and the turns of a chat
    other than the assistant's, are masked from the loss.

    Args:
      file: The examples.
      tokenizer: The model's tokenizer.
      max_length: Maximum sequence length in tokens.
      truncate: How longer examples are treated: `"right"` truncates them, `"drop"` drops them, and
        `"error"` raises an error. Documents of a folder of texts are split into pieces instead.
      mask_prompt: False includes prompts in the loss; None masks prompts, except in plain text.
      turns: Assistant turns that are included in the loss: `"all"` or only the `"last"`.

    Returns:
      The examples, in the file's order.

    Raises:
      DataError: An example is too long and `truncate="error"`, or no example has a target token.
    """
    examples: list[Example] = []
    dropped: list[int] = []
    cut = unlocated = pieces = 0
    for row in _rendered_ahead(file.rows, tokenizer):
        with file.located(row):
            encoded = encode_row(row, tokenizer, mask_prompt=mask_prompt, turns=turns)
        unlocated += encoded.unlocated
        ids, loss_mask = np.asarray(encoded.ids, np.int32), np.asarray(encoded.loss_mask, bool)
        whole = Example(ids, loss_mask, row.line, encoded.raw)
        if len(whole.ids) <= max_length:
            kept = [whole]
        elif row.kind == "document":
            kept = list(_pieces(whole, max_length))
            pieces += len(kept)
        elif truncate == "error":
            raise too_long(file.where(row), f"{len(whole.ids)} tokens", max_length)
        elif truncate == "right":
            cut += 1
            kept = [_part(whole, 0, max_length)]
        else:
            kept = []
        # The first token is never predicted, so an example needs a target token after it.
        useful = [example for example in kept if example.loss_mask[1:].any()]
        examples += useful
        dropped += [] if useful else [row.line]
    if not examples:
        raise DataError(
            str(file.path),
            got=f"{len(dropped)} examples without a target token in the first {max_length}",
            expected="at least one example with a target token",
            fix="Raise max_seq_length, or shorten the prompts.",
        )
    return Examples(tuple(examples), cut, tuple(dropped), unlocated, pieces)


def _rendered_ahead(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[Row]:
    """Yield the rows. The chats of `RENDERED_AHEAD` rows at a time are rendered together."""
    for start in range(0, len(rows), RENDERED_AHEAD):
        some = rows[start : start + RENDERED_AHEAD]
        chats = [each for row in some for each in renderings(row)]
        if chats:
            tokenizer.render_ahead(chats)
        yield from some


def _pieces(example: Example, length: int) -> Iterator[Example]:
    """Split a document. Pieces overlap by one token, so that no target token is lost."""
    for start in range(0, len(example.ids) - 1, length - 1):
        yield _part(example, start, start + length)


def _part(example: Example, start: int, stop: int) -> Example:
    ids = example.ids[start:stop]
    raw = min(example.raw, max(len(ids) - (start > 0), 0))
    return dataclasses.replace(example, ids=ids, loss_mask=example.loss_mask[start:stop], raw=raw)


def too_long(where: str, got: str, max_length: int) -> DataError:
    """Return the exception for an example that `truncate="error"` refuses."""
    return DataError(
        where,
        got=got,
        expected=f"at most {max_length} (max_seq_length)",
        fix='Raise max_seq_length, or set truncate to "right" or "drop".',
    )
