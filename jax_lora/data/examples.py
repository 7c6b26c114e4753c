"""Turns rows into ids, with a mark at every token that is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_lora.data.rows import Row, RowFile
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError, explain


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
    """

    rows: tuple[Example, ...]
    cut: int = 0
    dropped: tuple[int, ...] = ()


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
        `"error"` refuses the file.
      mask_prompt: False learns prompts too; None follows the format (True, but for text).
      turns: Which of a chat's answers are learned: `"all"` or the `"last"`.

    Returns:
      The examples, in the file's order.

    Raises:
      DataError: `truncate="error"` and a long row, or no row is left.
    """
    examples, dropped, cut = [], [], 0
    for row in file.rows:
        example = _encode(row, tokenizer, mask_prompt, file)
        if len(example.ids) > max_length:
            if truncate == "error":
                raise DataError(_too_long(f"{file.path}:{row.line}", len(example.ids), max_length))
            cut += truncate == "right"
            example = _shorten(example, 0 if truncate == "drop" else max_length)
        # The first token is never predicted, so it cannot be all there is to learn.
        if example.learned[1:].any():
            examples.append(example)
        else:
            dropped.append(row.line)
    if not examples:
        raise DataError(
            explain(
                str(file.path),
                got=f"{len(dropped)} rows, of which none has a token to learn within {max_length}",
                expected="at least one",
                fix="Raise --max-seq-length, or shorten the prompts.",
            )
        )
    return Examples(tuple(examples), cut, tuple(dropped))


def _shorten(example: Example, length: int) -> Example:
    return dataclasses.replace(
        example,
        ids=example.ids[:length],
        learned=example.learned[:length],
        raw=min(example.raw, length),
    )


def _too_long(where: str, length: int, max_length: int) -> str:
    return explain(
        where,
        got=f"{length} tokens",
        expected=f"at most {max_length} (--max-seq-length)",
        fix="Raise --max-seq-length, or allow --truncate right or drop.",
    )


# -----------------------------------------------------------------------------------------------
# One function per format: ids, and which of them are learned
# -----------------------------------------------------------------------------------------------


def _encode(row: Row, tokenizer: Tokenizer, mask_prompt: bool | None, file: RowFile) -> Example:
    try:
        ids, learned = _ENCODERS[row.kind](row.fields, tokenizer)
    except DataError as error:
        raise DataError(f"{file.path}:{row.line}: {error}") from error
    if mask_prompt is False or (mask_prompt is None and row.kind == "text"):
        learned = [True] * len(ids)
    raw = raw_tokens(row, tokenizer) if row.kind == "chat" else _without_ends(ids, tokenizer)
    return Example(np.asarray(ids, np.int32), np.asarray(learned, bool), row.line, raw)


def _without_ends(ids: list[int], tokenizer: Tokenizer) -> int:
    return sum(index not in (tokenizer.bos_id, tokenizer.eos_id) for index in ids)


def raw_tokens(row: Row, tokenizer: Tokenizer) -> int:
    """Count the tokens of a chat's contents, each by itself.

    Args:
      row: A row of the format chat.
      tokenizer: The model's tokenizer.

    Returns:
      Their sum.
    """
    contents = (turn.get("content") for turn in row.fields["messages"])
    texts = [content for content in contents if isinstance(content, str)]
    return sum(_without_ends(tokenizer.encode(text), tokenizer) for text in texts)


def encode_prompt(fields: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Encode what a model is given before it answers, exactly as training showed it.

    Args:
      fields: A row with `prompt`, or a chat, of which all before the last answer is the prompt.
      tokenizer: The model's tokenizer.

    Returns:
      The ids.
    """
    if "messages" in fields:
        last = max(i for i, turn in enumerate(fields["messages"]) if turn["role"] == "assistant")
        return tokenizer.encode(tokenizer.render(fields["messages"][:last], answer_next=True))
    return tokenizer.encode(fields["prompt"])


def _completion(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    prompt = tokenizer.encode(row["prompt"])
    ids = tokenizer.encode(row["prompt"] + row["completion"])
    # Together they can merge across the seam into a token that no prompt alone ever ends with.
    if ids[: len(prompt)] != prompt:
        answer = tokenizer.encode(row["completion"])
        ids = prompt + answer[len(answer[:1]) if answer[:1] == [tokenizer.bos_id] else 0 :]
    learned = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    return _ended(ids, learned, tokenizer)


def _text(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids = tokenizer.encode(row["text"])
    return _ended(ids, [True] * len(ids), tokenizer)


def _chat(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    messages = row["messages"]
    text = tokenizer.render(messages)
    ids, ends = tokenizer.encode_with_ends(text)
    spans = _answer_spans(messages, text, tokenizer)
    learned = [any(start < end <= stop for start, stop in spans) for end in ends]
    if messages[-1]["role"] != "assistant":
        return ids, learned
    # Some templates close the last answer, with a new line behind it or not, and some forget to.
    closed = tokenizer.eos_id in [index for index, known in zip(ids, learned, strict=True) if known]
    return (ids, learned) if closed else ([*ids, tokenizer.eos_id], [*learned, True])


def _answer_spans(
    messages: list[dict[str, Any]], text: str, tokenizer: Tokenizer
) -> list[tuple[int, int]]:
    """Find where in the text the assistant's answers stand, in characters."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render(messages[:index], answer_next=True)
        after = tokenizer.render(messages[: index + 1])
        # A template may write earlier turns differently once a later one follows.
        if text.startswith(before) and text.startswith(after):
            spans.append((len(before), len(after)))
    if not spans:
        raise DataError(
            explain(
                "the chat template",
                got="a conversation in which no answer follows its own prompt unchanged",
                expected="at least one answer that stands where generation would put it",
                fix='Write the row as "prompt" and "completion".',
            )
        )
    return spans


def _ended(
    ids: list[int], learned: list[bool], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Append the end token, which is learned like any other, unless it is there."""
    if ids[-1:] == [tokenizer.eos_id] and learned[-1]:
        return ids, learned
    return [*ids, tokenizer.eos_id], [*learned, True]


_ENCODERS: dict[str, Callable[[dict[str, Any], Tokenizer], tuple[list[int], list[bool]]]] = {
    "completions": _completion,
    "text": _text,
    "chat": _chat,
}
