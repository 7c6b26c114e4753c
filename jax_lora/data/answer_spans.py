"""Locate the assistant's responses, with their end-of-turn text, in a rendered conversation."""

from __future__ import annotations

from typing import Any

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError, format_error

Span = tuple[int, int]  # start and end (exclusive), in characters


def answer_spans(
    messages: list[dict[str, Any]],
    text: str,
    tokenizer: Tokenizer,
    tools: Any = None,
    learn_from: int = 0,
) -> tuple[list[Span], int]:
    """Find the responses in the text of the whole conversation.

    The start of a response is the length of the rendered turns before it, with the generation
    prompt; its end is the length of the rendered turns up to and including it. Some templates
    change earlier turns once a later one follows (they remove reasoning). Such a response is
    located by its content instead, after the preceding turns.

    Args:
      messages: The turns.
      text: The rendered conversation.
      tokenizer: The model's tokenizer.
      tools: Descriptions of the tools that the model may call.
      learn_from: Index of the first turn that is included in the loss.

    Returns:
      The spans, and the number of responses that were not found.

    Raises:
      DataError: No response was found.
    """
    wanted = [
        index
        for index, turn in enumerate(messages)
        if turn["role"] == "assistant" and index >= learn_from
    ]
    exact = {index: _after_prompt(messages, index, text, tokenizer, tools) for index in wanted}
    closing = _closing(messages, text, exact)
    found = [exact[i] or _by_content(messages, i, text, closing) for i in wanted]
    spans = [span for span in found if span is not None]
    if not spans:
        raise DataError(
            format_error(
                "the chat template",
                got="a conversation in which no response follows its rendered prompt",
                expected="at least one response right after the generation prompt",
                fix='Write the row as "prompt" and "completion".',
            )
        )
    return spans, len(wanted) - len(spans)


def _after_prompt(
    messages: list[dict[str, Any]], index: int, text: str, tokenizer: Tokenizer, tools: Any
) -> Span | None:
    """Locate a response by rendering the turns before it and the turns up to it."""
    try:
        before = tokenizer.render(messages[:index], answer_next=True, tools=tools)
        after = tokenizer.render(messages[: index + 1], tools=tools)
    except DataError:  # a template may reject a conversation that begins with a response
        return None
    fits = text.startswith(before) and text.startswith(after) and len(before) < len(after)
    return (len(before), len(after)) if fits else None


def _closing(
    messages: list[dict[str, Any]], text: str, exact: dict[int, Span | None]
) -> str | None:
    """Return the end-of-turn text, taken from a response that was located exactly."""
    for index, span in exact.items():
        content = messages[index]["content"].strip()
        if span is not None and content:
            answer = text[slice(*span)]
            at = answer.rfind(content)
            if at >= 0:
                return answer[at + len(content) :]
    return None


def _by_content(
    messages: list[dict[str, Any]], index: int, text: str, closing: str | None
) -> Span | None:
    """Locate a response by its content, after the contents of the preceding turns."""
    cursor = 0
    for turn in messages[:index]:
        content = turn["content"].strip()
        at = text.find(content, cursor)
        cursor = at + len(content) if at >= 0 else cursor
    content = messages[index]["content"].strip()
    # Templates may remove the reasoning in front of a response.
    for part in (content, content.rpartition("</think>")[2].strip()):
        at = text.find(part, cursor) if part else -1
        if at >= 0:
            end = at + len(part)
            closed = closing is not None and text.startswith(closing, end)
            return at, end + (len(closing) if closed and closing else 0)
    return None
