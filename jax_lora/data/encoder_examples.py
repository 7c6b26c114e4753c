"""Examples for models with an encoder: classification, masked language modeling, seq2seq."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_lora.data.encoder_tokenizer import EncodedText, EncoderTokenizer
from jax_lora.data.examples import Examples, too_long
from jax_lora.data.rows import Row, RowFile
from jax_lora.errors import DataError

MASKED_SHARE = 0.15
NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class TextExample:
    """A text, or a pair of texts, for an encoder.

    Args:
      ids, types, special: As in `EncodedText`.
      line: Line of the example in its file.
      label: Index of its class; `NO_LABEL` without one.
      targets: Number of targets: 1 for a class, the number of masked tokens otherwise.
    """

    ids: np.ndarray
    types: np.ndarray
    special: np.ndarray
    line: int
    label: int = NO_LABEL
    targets: int = 1

    @property
    def tokens(self) -> int:
        """Count the tokens."""
        return len(self.ids)

    @property
    def raw(self) -> int:
        """Count the tokens without special tokens."""
        return int((~self.special).sum())


@dataclasses.dataclass(frozen=True)
class Seq2SeqExample:
    """A prompt for an encoder and a completion for a decoder.

    Args:
      ids: (tokens,) int32, the prompt.
      completion: (targets,) int32, the completion with its end token.
      line: Line of the example in its file.
      raw: Number of tokens of both texts, without special tokens.
    """

    ids: np.ndarray
    completion: np.ndarray
    line: int
    raw: int = 0

    @property
    def targets(self) -> int:
        """Count the target tokens."""
        return len(self.completion)

    @property
    def tokens(self) -> int:
        """Count the tokens of prompt and completion."""
        return len(self.ids) + len(self.completion)


def classification_examples(
    file: RowFile,
    tokenizer: EncoderTokenizer,
    labels: Sequence[str],
    *,
    max_length: int,
    truncate: str = "right",
) -> Examples:
    """Tokenize texts, or pairs of texts, with their classes.

    Args:
      file: Examples `{"text", "label"}` or `{"text_a", "text_b", "label"}`; without a label, the
        class is `NO_LABEL`.
      tokenizer: The model's tokenizer.
      labels: Names of the classes, in the order of their indices.
      max_length: Maximum sequence length in tokens.
      truncate: `"right"` truncates longer examples, `"drop"` drops them, `"error"` raises an error.

    Returns:
      The examples.

    Raises:
      DataError: An example has no text or an unknown label, or `truncate="error"` and a long text.
    """
    numbers = {name: number for number, name in enumerate(labels)}

    def encode(row: Row) -> tuple[Any, bool]:
        encoded = _encoded(file, row, tokenizer, max_length)
        label = row.fields.get("label")
        if label is not None and label not in numbers:
            raise DataError(
                file.where(row),
                got=f"the label {label!r}",
                expected=f"one of {', '.join(map(repr, labels))}",
                fix="Correct the label, or add examples with it to the training split.",
            )
        number = NO_LABEL if label is None else numbers[label]
        return TextExample(*encoded[:3], line=row.line, label=number), encoded.cut

    return _collect(file, encode, max_length, truncate)


def masked_lm_examples(
    file: RowFile, tokenizer: EncoderTokenizer, *, max_length: int, truncate: str = "right"
) -> Examples:
    """Tokenize texts for masked language modeling, with 15% of the tokens masked.

    Args:
      file: Examples `{"text"}` or `{"text_a", "text_b"}`.
      tokenizer: The model's tokenizer.
      max_length: Maximum sequence length in tokens.
      truncate: As in `classification_examples`.

    Returns:
      The examples.

    Raises:
      DataError: An example has no text, or `truncate="error"` and a long text.
    """

    def encode(row: Row) -> tuple[Any, bool]:
        encoded = _encoded(file, row, tokenizer, max_length)
        usable = int((~encoded.special).sum())
        if not usable:
            return None, encoded.cut
        targets = max(1, round(MASKED_SHARE * usable))
        return TextExample(*encoded[:3], line=row.line, targets=targets), encoded.cut

    return _collect(file, encode, max_length, truncate)


def seq2seq_examples(
    file: RowFile,
    tokenizer: EncoderTokenizer,
    *,
    max_length: int,
    eos_id: int,
    truncate: str = "right",
) -> Examples:
    """Tokenize prompts and completions.

    Args:
      file: Examples `{"prompt", "completion"}`.
      tokenizer: The model's tokenizer.
      max_length: Maximum number of tokens of a prompt, and of a completion.
      eos_id: The end token of both.
      truncate: As in `classification_examples`.

    Returns:
      The examples.

    Raises:
      DataError: An example has no prompt and completion, or `truncate="error"` and a long text.
    """

    def ended(encoded: EncodedText) -> np.ndarray:
        if encoded.ids[-1:].tolist() == [eos_id]:
            return encoded.ids
        return np.append(encoded.ids[: max_length - 1], np.int32(eos_id))

    def encode(row: Row) -> tuple[Any, bool]:
        if row.kind != "completions":
            raise _wrong_kind(file, row, 'an example with "prompt" and "completion"')
        with file.located(row):
            both = [
                tokenizer.encode(row.fields[name], max_length=max_length)
                for name in ("prompt", "completion")
            ]
        raw = sum(int((~each.special).sum()) for each in both)
        example = Seq2SeqExample(*map(ended, both), line=row.line, raw=raw)
        return example, any(each.cut for each in both)

    return _collect(file, encode, max_length, truncate)


def find_labels(file: RowFile) -> tuple[str, ...]:
    """Collect the labels of a file, in numeric or else alphabetic order.

    Args:
      file: The training split.

    Returns:
      The labels.

    Raises:
      DataError: An example has no label, or all examples have the same label.
    """
    for row in file.rows:
        if row.fields.get("label") is None:
            raise _wrong_kind(file, row, 'a "label" in every example')
    found = {row.fields["label"] for row in file.rows}
    if len(found) < 2:
        raise DataError(
            str(file.path),
            got=f"{len(file.rows)} examples with the label {min(found)!r}",
            expected="at least two classes",
            fix="Add examples of other classes.",
        )
    numeric = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=int if numeric else str))


def texts_of(file: RowFile, row: Row) -> tuple[str, str | None]:
    """Return the text of an example, or its pair of texts.

    Args:
      file: The file, for messages.
      row: The example.

    Returns:
      The text, and the second text or None.

    Raises:
      DataError: The example has neither.
    """
    if "text_a" in row.fields:
        return row.fields["text_a"], row.fields.get("text_b")
    if "text" in row.fields:
        return row.fields["text"], None
    raise _wrong_kind(file, row, 'an example with "text", or "text_a" and "text_b"')


def _encoded(file: RowFile, row: Row, tokenizer: EncoderTokenizer, max_length: int) -> EncodedText:
    texts = texts_of(file, row)
    with file.located(row):
        return tokenizer.encode(*texts, max_length=max_length)


def _wrong_kind(file: RowFile, row: Row, expected: str) -> DataError:
    fields = ", ".join(f'"{name}"' for name in list(row.fields)[:10])
    return DataError(
        file.where(row),
        got=f"an example with the fields {fields}",
        expected=expected,
        fix="Rename the fields, or choose another task.",
    )


def _collect(
    file: RowFile, encode: Callable[[Row], tuple[Any, bool]], max_length: int, truncate: str
) -> Examples:
    """Tokenize every example, and count truncated and dropped ones."""
    examples, dropped, cut = [], [], 0
    for row in file.rows:
        example, was_cut = encode(row)
        if was_cut and truncate == "error":
            raise too_long(file.where(row), f"more than {max_length} tokens", max_length)
        if example is None or (was_cut and truncate == "drop"):
            dropped.append(row.line)
            continue
        cut += was_cut
        examples.append(example)
    if not examples:
        raise DataError(
            str(file.path),
            got=f"{len(dropped)} examples, all dropped at a maximum of {max_length} tokens",
            expected="at least one usable example",
            fix="Raise max_seq_length.",
        )
    return Examples(tuple(examples), cut, tuple(dropped))
