"""Where in a conversation's text the assistant's answers stand, each with what closes it."""

from __future__ import annotations

from typing import Any

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError, format_error

Span = tuple[int, int]  # first character and the one behind the last


def answer_spans(
    messages: list[dict[str, Any]],
    text: str,
    tokenizer: Tokenizer,
    tools: Any = None,
    learn_from: int = 0,
) -> tuple[list[Span], int]:
    """Find the answers in the text of the whole conversation.

    An answer is what follows its own prompt, written out with the beginning of an answer, up to
    where the text goes on that ends with it. Some templates write earlier turns differently once a
    later one follows (thoughts are left out): such an answer is looked for by its content, behind
    the turns before it, and closed as one is that was found.

    Args:
      messages: The turns.
      text: All of them, written out.
      tokenizer: The model's tokenizer.
      tools: Descriptions of the tools that the model may call.
      learn_from: The first turn whose answer is wanted.

    Returns:
      The answers' places, and how many could not be found.

    Raises:
      DataError: Not one was found.
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
                got="a conversation in which no answer follows its own prompt unchanged",
                expected="at least one answer that stands where generation would put it",
                fix='Write the row as "prompt" and "completion".',
            )
        )
    return spans, len(wanted) - len(spans)


def _after_prompt(
    messages: list[dict[str, Any]], index: int, text: str, tokenizer: Tokenizer, tools: Any
) -> Span | None:
    """Place an answer by the texts that end before it and with it."""
    try:
        before = tokenizer.render(messages[:index], answer_next=True, tools=tools)
        after = tokenizer.render(messages[: index + 1], tools=tools)
    except DataError:  # a template may refuse a conversation that begins with an answer
        return None
    fits = text.startswith(before) and text.startswith(after) and len(before) < len(after)
    return (len(before), len(after)) if fits else None


def _closing(
    messages: list[dict[str, Any]], text: str, exact: dict[int, Span | None]
) -> str | None:
    """What stands behind an answer's content, as an answer shows that was placed exactly."""
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
    """Place an answer by its content, behind the contents of the turns before it."""
    cursor = 0
    for turn in messages[:index]:
        content = turn["content"].strip()
        at = text.find(content, cursor)
        cursor = at + len(content) if at >= 0 else cursor
    content = messages[index]["content"].strip()
    # What a model thought stands in front of its answer, and is what templates leave out.
    for part in (content, content.rpartition("</think>")[2].strip()):
        at = text.find(part, cursor) if part else -1
        if at >= 0:
            end = at + len(part)
            closed = closing is not None and text.startswith(closing, end)
            return at, end + (len(closing) if closed and closing else 0)
    return None
