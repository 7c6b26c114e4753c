"""Locate the assistant's responses, with their end-of-turn text, in a rendered conversation."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jax_lora.data.chat_template import Rendering
from jax_lora.data.content_marks import mark, unmark
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.data.turns import target_turns
from jax_lora.errors import DataError

Span = tuple[int, int]  # start and end (exclusive), in characters


def answer_spans(
    messages: list[dict[str, Any]],
    text: str,
    tokenizer: Tokenizer,
    tools: Any = None,
    learn_from: int = 0,
) -> tuple[list[Span], int]:
    """Find the responses in the text of the whole conversation.

    A response starts after the generation prompt and ends before the header of the next message.
    Marks in the other messages delimit the part of the text that contains it. The generation prompt
    and the headers are each rendered once for every sequence of roles, so the time is linear in the
    number of messages, and templates may change a response once another message follows.

    Returns:
      The spans, and the number of responses that were not found.

    Raises:
      DataError: No response was found.
    """
    wanted = target_turns(messages, learn_from)
    locate = _Locator(messages, text, tokenizer, tools, newest=wanted[-1])
    spans = [span for index in wanted if (span := locate(index)) is not None]
    if not spans:
        raise DataError(
            "the chat template",
            got="a conversation in which no response follows its rendered prompt",
            expected="at least one response right after the generation prompt",
            fix='Write the row as "prompt" and "completion".',
        )
    return spans, len(wanted) - len(spans)


def located_with(
    messages: list[dict[str, Any]], tools: Any, learn_from: int = 0
) -> Iterator[Rendering]:
    """Return the renderings that `answer_spans` is likely to ask for, to render them ahead."""
    marked = mark(messages)
    yield Rendering(marked, tools=tools)
    both = zip(marked, messages, strict=True)
    marks = [index for index, (one, other) in enumerate(both) if one is not other]
    keys = set()
    wanted = target_turns(messages, learn_from)
    for index in wanted:
        before, after = _beside(marks, index)
        start = (index == wanted[-1], _roles(messages, before, index))
        if index and start not in keys:
            yield Rendering(marked[:index], answer_next=True, tools=tools)
        end = _roles(messages, index, after)
        if index + 1 < len(messages) and end not in keys:
            yield Rendering(messages[: index + 1], tools=tools)
        keys |= {start, end}


class _Locator:
    """Locates one response after the other in a conversation."""

    def __init__(
        self,
        messages: list[dict[str, Any]],
        text: str,
        tokenizer: Tokenizer,
        tools: Any,
        newest: int,
    ):
        self._messages, self._text, self._tokenizer, self._tools = messages, text, tokenizer, tools
        self._newest = newest
        self._marked = mark(messages)
        unmarked, contents = unmark(self._render(self._marked))
        # A template that looks at the ends of a content may render it differently with marks.
        self._contents = contents if unmarked == text else {}
        self._marks = sorted(self._contents)
        self._prompts: dict[Any, str] = {}
        self._headers: dict[Any, str] = {}

    def __call__(self, index: int) -> Span | None:
        """Return the span of a response, or None if the template changes its text."""
        before, after = _beside(self._marks, index)
        start = self._start(index, before)
        end = None if start is None else self._end(index, start, after)
        if start is None or end is None:
            return None
        return (start, end) if _is_in(self._messages[index], self._text[start:end]) else None

    def _start(self, index: int, before: int | None) -> int | None:
        at = 0 if before is None else self._contents[before][1]
        # Only the newest response always follows the whole generation prompt.
        key = (index == self._newest, _roles(self._messages, before, index))
        known = self._prompts.get(key)
        if before is not None and known and self._text.startswith(known, at):
            return at + len(known)
        prompt = self._render(self._marked[:index], answer_next=True)
        if index == 0 or not prompt:  # many templates reject a conversation without a question
            found = self._text.find(self._messages[index]["content"].strip(), at)
            return found if found >= 0 and self._messages[index]["content"].strip() else None
        prompt = _after_mark(prompt, before)
        shared = os.path.commonprefix([prompt, self._text[at : at + len(prompt)]])
        if len(shared) < len(prompt):
            if before is None:
                return None
            # Characters of the response may agree by chance: end at the end of a line or a tag.
            shared = shared[: max(shared.rfind(each) for each in "\n> ]") + 1]
        self._prompts[key] = shared
        return at + len(shared)

    def _end(self, index: int, start: int, after: int | None) -> int | None:
        if index + 1 == len(self._messages):
            return len(self._text)
        stop = len(self._text) if after is None else self._contents[after][0]
        key = _roles(self._messages, index, after)
        known = self._headers.get(key)
        if known and after is not None and self._text.endswith(known, start, stop):
            return stop - len(known)
        alone = self._render(self._messages[: index + 1])
        end = len(alone)
        if not self._text.startswith(alone) or not start < end <= stop:
            if not self._contents:
                return None
            end = _best_end(alone, self._text, start, stop)
        if after is not None:
            self._headers[key] = self._text[end:stop]
        return end

    def _render(self, messages: list[dict[str, Any]], *, answer_next: bool = False) -> str:
        try:
            return self._tokenizer.render(messages, answer_next=answer_next, tools=self._tools)
        except DataError:  # a template may refuse a part of a conversation
            return ""


def _beside(marks: Sequence[int], index: int) -> tuple[int | None, int | None]:
    """Return the marked messages before and after a response."""
    before, after = bisect.bisect_left(marks, index), bisect.bisect_right(marks, index)
    return (marks[before - 1] if before else None, marks[after] if after < len(marks) else None)


def _roles(messages: list[dict[str, Any]], first: int | None, last: int | None) -> tuple[Any, ...]:
    """Return the roles from one message to another, which the text between them depends on."""
    part = messages[first or 0 : None if last is None else last + 1]
    return (first is None, last is None, *(turn["role"] for turn in part))


def _after_mark(prompt: str, before: int | None) -> str:
    unmarked, contents = unmark(prompt)
    return unmarked[contents[before][1] :] if before in contents else unmarked


def _best_end(alone: str, text: str, start: int, stop: int) -> int:
    """Return where the text agrees longest with the end of a conversation that ends there."""
    most, best = 0, stop
    for end in range(start + 1, stop + 1):
        length = 0
        limit = min(end - start, len(alone))
        while length < limit and text[end - 1 - length] == alone[-1 - length]:
            length += 1
        if length > most:
            most, best = length, end
    return best


def _is_in(message: dict[str, Any], said: str) -> bool:
    """Return whether a response's content, or its part after the reasoning, is in the text."""
    calls = message.get("tool_calls") or []
    if not all(call.get("function", call)["name"] in said for call in calls):
        return False
    content = message["content"].strip()
    return bool(said) and (content in said or content.rpartition("</think>")[2].strip() in said)
