"""Mark the contents of messages, to find them again in a rendered conversation."""

from __future__ import annotations

import re
from typing import Any

# Private-use characters: no template treats them specially, and text seldom contains them.
_OPEN, _CLOSE = "\U000f5a00", "\U000f5a01"
_MARK = re.compile(f"{_OPEN}([0-9]+)([<>]){_CLOSE}")


def mark(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark both ends of the content of every message, except empty ones and most responses.

    White space at the ends stays outside the marks, because templates may trim it. A response is
    marked only next to another response, because templates look for reasoning at its start.
    """
    return [_marked(messages, index) for index in range(len(messages))]


def unmark(text: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """Remove the marks from a rendered conversation.

    Returns:
      The text without marks, and the start and end of each content with both marks in the text.
    """
    pieces, ends = [], {"<": {}, ">": {}}
    before = length = 0
    for found in _MARK.finditer(text):
        pieces.append(text[before : found.start()])
        length += found.start() - before
        before = found.end()
        ends[found[2]].setdefault(int(found[1]), length)
    pieces.append(text[before:])
    both = ends["<"].keys() & ends[">"].keys()
    return "".join(pieces), {index: (ends["<"][index], ends[">"][index]) for index in both}


def _marked(messages: list[dict[str, Any]], index: int) -> dict[str, Any]:
    message = messages[index]
    content = message["content"]
    core = content.strip()
    responses = [turn["role"] == "assistant" for turn in messages[max(0, index - 1) : index + 2]]
    if not core or (message["role"] == "assistant" and sum(responses) == 1):
        return message
    start, end = (f"{_OPEN}{index}{side}{_CLOSE}" for side in "<>")
    return {**message, "content": content.replace(core, f"{start}{core}{end}", 1)}
