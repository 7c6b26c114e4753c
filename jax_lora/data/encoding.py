"""One row as ids, with a mark at every token that is learned: a function per form of row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax_lora.data.answer_spans import answer_spans
from jax_lora.data.rows import Row
from jax_lora.data.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """A row as the model sees it.

    Attributes:
      ids: The tokens.
      learned: As many booleans: True where the token is one to predict.
      raw: Tokens of the row's own text, without template, start and end tokens.
      unlocated: Answers that are not learned, as the template writes them as other texts.
    """

    ids: list[int]
    learned: list[bool]
    raw: int
    unlocated: int = 0


def encode_row(
    row: Row, tokenizer: Tokenizer, *, mask_prompt: bool | None = None, turns: str = "all"
) -> Encoded:
    """Encode a row.

    Args:
      row: The row.
      tokenizer: The model's tokenizer.
      mask_prompt: False learns prompts too; None follows the form (True, but for text).
      turns: Which of a chat's answers are learned: `"all"` or the `"last"`.

    Returns:
      Its ids and marks.

    Raises:
      DataError: The chat template refuses the conversation.
    """
    encoded = _ENCODERS[row.kind](row.fields, tokenizer, turns)
    if mask_prompt is False:
        return encoded._replace(learned=[True] * len(encoded.ids))
    return encoded


def encode_prompt(fields: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Encode what a model is given before it answers, exactly as training showed it.

    Args:
      fields: A row with `prompt`, or a chat, of which all before the last answer is the prompt.
      tokenizer: The model's tokenizer.

    Returns:
      The ids.
    """
    if "messages" in fields:
        messages, tools = fields["messages"], fields.get("tools")
        last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
        text = tokenizer.render(messages[:last], answer_next=True, tools=tools)
        return tokenizer.encode(text)
    return tokenizer.encode(fields["prompt"])


def _completion(row: dict[str, Any], tokenizer: Tokenizer, turns: str) -> Encoded:
    prompt = tokenizer.encode(row["prompt"])
    ids = tokenizer.encode(row["prompt"] + row["completion"])
    # Together they can merge across the seam into a token that no prompt alone ever ends with.
    if ids[: len(prompt)] != prompt:
        answer = tokenizer.encode(row["completion"])
        ids = prompt + answer[len(answer[:1]) if answer[:1] == [tokenizer.bos_id] else 0 :]
    learned = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    return _ended(ids, learned, tokenizer)


def _text(row: dict[str, Any], tokenizer: Tokenizer, turns: str) -> Encoded:
    ids = tokenizer.encode(row["text"])
    return _ended(ids, [True] * len(ids), tokenizer)


def _ended(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> Encoded:
    """Append the end token, which is learned like any other, unless it is there."""
    raw = _own(ids, tokenizer)
    if ids[-1:] == [tokenizer.eos_id] and learned[-1]:
        return Encoded(ids, learned, raw)
    return Encoded([*ids, tokenizer.eos_id], [*learned, True], raw)


def _own(ids: list[int], tokenizer: Tokenizer) -> int:
    return sum(index not in (tokenizer.bos_id, tokenizer.eos_id) for index in ids)


def _chat(row: dict[str, Any], tokenizer: Tokenizer, turns: str) -> Encoded:
    messages, tools = row["messages"], row.get("tools")
    text = tokenizer.render(messages, tools=tools)
    ids, ends = tokenizer.encode_with_ends(text)
    spans, unlocated = answer_spans(messages, text, tokenizer, tools, row.get("learn_from", 0))
    spans = spans[-1:] if turns == "last" else spans
    learned = [any(start < end <= stop for start, stop in spans) for end in ends]
    raw = sum(_own(tokenizer.encode(turn["content"]), tokenizer) for turn in messages)
    if messages[-1]["role"] == "assistant" and not _closed(ids, learned, tokenizer):
        ids, learned = [*ids, tokenizer.eos_id], [*learned, True]
    return Encoded(ids, learned, raw, unlocated)


def _closed(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> bool:
    """Tell whether the template closes the last answer, with its own end of a turn or the model's.

    There may be a new line behind it.
    """
    tail = [index for index, known in zip(ids, learned, strict=True) if known][-3:]
    return any(index == tokenizer.eos_id or tokenizer.is_special(index) for index in tail)


_ENCODERS: dict[str, Callable[[dict[str, Any], Tokenizer, str], Encoded]] = {
    "completions": _completion,
    "text": _text,
    "document": _text,
    "chat": _chat,
}
