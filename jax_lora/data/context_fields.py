"""Fields of an example besides its texts or turns: a system prompt, tools, earlier turns."""

from __future__ import annotations

import itertools
from typing import Any

from jax_lora.data.problem import Problem, check_characters, check_text
from jax_lora.data.turns import check_tools, parsed_json

SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
# Fields that change the targets or their context, and that no format uses.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages")
_UNUSED = (*_PREFERENCES, "documents", "suffix", "chat_template_kwargs", *_MEDIA)
# Marks of a whole example. A value that is not a number, such as a text, has another meaning.
_MARKS = ("weight", "train", "training")


def check_other_fields(row: dict[str, Any], used: tuple[str, ...]) -> None:
    """Refuse a field that changes the targets or their context, unless it is one of `used`."""
    for name in (*SYSTEM, *TOOLS, "history", *_UNUSED):
        if row.get(name) and name not in used:
            raise Problem(
                f'"{name}" is not used with {_shown(row)}',
                f'Write it into "messages", or remove "{name}".',
            )
    for name in _MARKS:
        value = row.get(name)
        if isinstance(value, bool | int | float) and value != 1:
            raise Problem(
                f'"{name}" of an example is {value!r:.40}, and examples have no weights',
                f'Remove the example, or "{name}".',
            )
    if row.get("label") is False:
        raise Problem(
            '"label" is false: an example of what a model should not answer',
            'Remove the example, or "label".',
        )


def system_of(row: dict[str, Any]) -> str:
    """Return the system prompt of an example, `""` if it has none."""
    texts = {name: row[name] for name in SYSTEM if row.get(name) not in (None, "")}
    for name in texts:
        check_text(row, name)
    if len(set(texts.values())) > 1:
        names = " and ".join(f'"{name}"' for name in texts)
        raise Problem(f"{names} differ", "Remove one of them.")
    return next(iter(texts.values()), "")


def with_system(row: dict[str, Any], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the system prompt of an example before its turns."""
    text = system_of(row)
    own = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
    if not text or own[:1] == [text]:
        return turns
    if own:
        raise Problem(
            '"system" differs from the system turn of the conversation', "Remove one of them."
        )
    return [{"role": "system", "content": text}, *turns]


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of an example: a list or its JSON, or the older field `"functions"`."""
    found = []
    for name in TOOLS:
        value = row.get(name)
        is_blank = isinstance(value, str) and not value.strip()
        tools = None if is_blank else check_tools(parsed_json(value), name)
        if name == "functions":
            tools = tools and [{"type": "function", "function": each} for each in tools]
        found.append(tools)
    if all(found):
        raise Problem('"tools" and "functions" are both given', "Remove one of them.")
    return found[0] or found[1]


def history_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the earlier turns of an Alpaca example: pairs of a question and an answer."""
    pairs = row.get("history") or []
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    )
    if not good:
        raise Problem(
            '"history" is not a list of pairs of strings', 'Write [["question", "answer"]].'
        )
    for text in itertools.chain(*pairs):
        check_characters(text, '"history"')
    return [(question, answer) for question, answer in pairs]


def _shown(row: dict[str, Any]) -> str:
    names = ("messages", "conversations", "prompt", "instruction", "question", "text", "text_a")
    return next((f'"{name}"' for name in names if name in row), "the text")
