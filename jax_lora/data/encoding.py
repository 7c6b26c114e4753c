"""Tokenize one example and compute its loss mask, with one function per format."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

from jax_lora.data.answer_spans import answer_spans, located_with
from jax_lora.data.chat_template import Rendering
from jax_lora.data.rows import Row
from jax_lora.data.template_worker import REASONING
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.data.turns import target_turns
from jax_lora.errors import DataError


class Encoded(NamedTuple):
    """A tokenized example.

    Attributes:
      ids: Token ids.
      loss_mask: A boolean per token: True for target tokens.
      raw: Number of tokens of the text itself, without template, BOS and EOS tokens.
      unlocated: Responses without loss, because the chat template changes their text.
    """

    ids: list[int]
    loss_mask: list[bool]
    raw: int
    unlocated: int = 0


def encode_row(
    row: Row, tokenizer: Tokenizer, *, mask_prompt: bool | None = None, turns: str = "all"
) -> Encoded:
    """Tokenize an example and compute its loss mask.

    Args:
      row: The example.
      tokenizer: The model's tokenizer.
      mask_prompt: False includes prompts in the loss; None masks prompts, except in plain text.
      turns: Assistant turns that are included in the loss: `"all"` or only the `"last"`.

    Returns:
      The ids and the loss mask.

    Raises:
      DataError: The chat template refuses the conversation.
    """
    encoded = _ENCODERS[row.kind](row.fields, tokenizer, turns)
    if mask_prompt is False:
        return encoded._replace(loss_mask=[True] * len(encoded.ids))
    return encoded


def renderings(row: Row) -> list[Rendering]:
    """Return the conversations that `encode_row` renders for an example."""
    if row.kind != "chat":  # a prompt template needs no process
        return []
    messages, tools = row.fields["messages"], row.fields.get("tools")
    parts = located_with(messages, tools, row.fields.get("learn_from", 0))
    return [Rendering(messages, tools=tools), *parts]


def encode_prompt(fields: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Tokenize the prompt of an example, with the same ids as in training.

    Args:
      fields: An example with `prompt`, or a chat: its prompt is all turns before the last response.
      tokenizer: The model's tokenizer.

    Returns:
      The ids.
    """
    if "messages" in fields:
        messages, tools = fields["messages"], fields.get("tools")
        last = target_turns(messages)[-1]
        text = tokenizer.render(messages[:last], answer_next=True, tools=tools)
        return tokenizer.encode(text)
    return tokenizer.encode(_prompt(fields, tokenizer))


def _prompt(fields: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Return the prompt of an example; a prompt template replaces the layout of Alpaca."""
    if tokenizer.formats_prompts and "turns" in fields:
        return tokenizer.render(fields["turns"][:-1], answer_next=True)
    return tokenizer.format_prompt(fields["prompt"])


def _completion(row: dict[str, Any], tokenizer: Tokenizer, turns: str) -> Encoded:
    text = _prompt(row, tokenizer)
    prompt = tokenizer.encode(text)
    ids = tokenizer.encode(text + row["completion"])
    # The tokenizer can merge the end of the prompt with the start of the completion into one token,
    # which never occurs at inference. In that case, the two are tokenized separately.
    if ids[: len(prompt)] != prompt:
        answer = tokenizer.encode(row["completion"])
        ids = prompt + answer[len(answer[:1]) if answer[:1] == [tokenizer.bos_id] else 0 :]
    loss_mask = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    encoded = _ended(ids, loss_mask, tokenizer)
    if not tokenizer.formats_prompts:
        return encoded
    turns_given = [turn["content"] for turn in row.get("turns", ())]
    return encoded._replace(raw=_raw(turns_given or [row["prompt"], row["completion"]], tokenizer))


def _text(row: dict[str, Any], tokenizer: Tokenizer, turns: str) -> Encoded:
    ids = tokenizer.encode(row["text"])
    return _ended(ids, [True] * len(ids), tokenizer)


def _labeled(row: dict[str, Any], tokenizer: Tokenizer, turns: str) -> Encoded:
    if "text" not in row:
        raise DataError(
            "the fields",
            got='a pair of texts, "text_a" and "text_b"',
            expected='"text", or "prompt" and "completion"',
            fix="Rename the fields; pairs of texts are for encoders such as BERT.",
        )
    return _text(row, tokenizer, turns)


def _ended(ids: list[int], loss_mask: list[bool], tokenizer: Tokenizer) -> Encoded:
    """Append EOS as a target token, unless the ids already end with it."""
    raw = _own(ids, tokenizer)
    if ids[-1:] == [tokenizer.eos_id] and loss_mask[-1]:
        return Encoded(ids, loss_mask, raw)
    return Encoded([*ids, tokenizer.eos_id], [*loss_mask, True], raw)


def _own(ids: list[int], tokenizer: Tokenizer) -> int:
    return sum(index not in (tokenizer.bos_id, tokenizer.eos_id) for index in ids)


def _raw(texts: list[str], tokenizer: Tokenizer) -> int:
    """Count the tokens of texts, without those of a template."""
    return sum(_own(tokenizer.encode(text), tokenizer) for text in texts)


def _chat(row: dict[str, Any], tokenizer: Tokenizer, turns: str) -> Encoded:
    messages, tools = row["messages"], row.get("tools")
    text = tokenizer.render(messages, tools=tools)
    _check_tools_are_in(text, tools)
    _check_turns_are_in(messages, text, tokenizer, tools)
    ids, ends = tokenizer.encode_with_ends(text)
    spans, unlocated = answer_spans(messages, text, tokenizer, tools, row.get("learn_from", 0))
    spans = spans[-1:] if turns == "last" else spans
    loss_mask = _between(ends, spans)
    raw = _raw([turn["content"] for turn in messages], tokenizer)
    if messages[-1]["role"] == "assistant" and not _closed(ids, loss_mask, tokenizer):
        ids, loss_mask = [*ids, tokenizer.eos_id], [*loss_mask, True]
    return Encoded(ids, loss_mask, raw, unlocated)


def _between(ends: list[int], spans: list[tuple[int, int]]) -> list[bool]:
    """Mark the tokens that end within one of the spans, which are in order."""
    starts = [start for start, _ in spans]
    found = [bisect.bisect_left(starts, end) - 1 for end in ends]
    return [at >= 0 and end <= spans[at][1] for at, end in zip(found, ends, strict=True)]


def _check_tools_are_in(text: str, tools: Any) -> None:
    for tool in tools or []:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            raise DataError(
                '"tools"',
                got=f"a chat template that does not show the tool {name!r}",
                expected="a template that writes the descriptions of tools",
                fix='Describe the tools in a system message, or remove "tools".',
            )


def _check_turns_are_in(
    messages: list[dict[str, Any]], text: str, tokenizer: Tokenizer, tools: Any
) -> None:
    """Refuse a conversation of which the template drops a turn, or the newest reasoning.

    `answer_spans` reports changed responses, and templates drop the reasoning of earlier ones.
    """
    parts = [(i, "content") for i, turn in enumerate(messages) if turn["role"] != "assistant"]
    newest = len(messages) - 1
    parts += [(newest, name) for name in REASONING if messages[newest].get(name)][:1]
    for index, name in parts:
        said = messages[index][name]
        if not isinstance(said, str) or not said.strip() or said.strip() in text:
            continue
        other = [*messages]  # a template may also escape the text, or change its case
        other[index] = messages[index] | {name: f"{said.rstrip()} ..."}
        if tokenizer.render(other, tools=tools) == text:
            raise DataError(
                f'"messages"[{index}]',
                got=f'a chat template that does not show the "{name}" of this turn '
                f"({messages[index]['role']})",
                expected="a template that shows every turn",
                fix=f'Write "{name}" into the content of another turn, or remove it.',
            )


def _closed(ids: list[int], loss_mask: list[bool], tokenizer: Tokenizer) -> bool:
    """Return whether the template ends the last response with an end-of-turn token or EOS.

    A newline may follow that token.
    """
    tail = [index for index, target in zip(ids, loss_mask, strict=True) if target][-3:]
    return any(index == tokenizer.eos_id or tokenizer.is_special(index) for index in tail)


_ENCODERS: dict[str, Callable[[dict[str, Any], Tokenizer, str], Encoded]] = {
    "completions": _completion,
    "text": _text,
    "labeled": _labeled,
    "document": _text,
    "chat": _chat,
}
