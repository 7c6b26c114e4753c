"""Fields beside the turns of an example: a system prompt, tools, earlier turns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jax_lora.data.problem import Problem, check_characters, kind_of
from jax_lora.data.turns import check_tools
from jax_lora.storage.json_files import parse_json

SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
# Fields that change what a model sees or learns, and that no format here uses.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages")
_UNUSED = (*_PREFERENCES, "documents", "suffix", "chat_template_kwargs", *_MEDIA)
# Marks of a whole example. Of other values, such as a text, nothing is known.
_MARKS = ("weight", "train", "training")


def check_beside(row: dict[str, Any], used: tuple[str, ...]) -> Problem | None:
    """Refuse a field that changes the targets or their context and that the format does not use.

    Args:
      row: The fields of an example.
      used: The fields of this module that the format uses.
    """
    for name in (*SYSTEM, *TOOLS, "history", *_UNUSED):
        if row.get(name) and name not in used:
            return Problem(
                f'"{name}" is not used beside {_shown(row)}',
                f'Write it into "messages", or remove "{name}".',
            )
    for name in _MARKS:
        value = row.get(name)
        if isinstance(value, bool | int | float) and value != 1:
            return Problem(
                f'"{name}" of an example is {value!r:.40}, and examples have no weights',
                f'Remove the example, or "{name}".',
            )
    if row.get("label") is False:
        return Problem(
            '"label" is false: an example of what a model should not answer',
            'Remove the example, or "label".',
        )
    return None


def system_of(row: dict[str, Any]) -> str | Problem:
    """Return the system prompt of an example, `""` if it has none."""
    texts = {name: row[name] for name in SYSTEM if row.get(name) not in (None, "")}
    for name, text in texts.items():
        if not isinstance(text, str):
            return Problem(f'"{name}" is {kind_of(text)}, not a string', f'Make "{name}" a string.')
        problem = check_characters(text, f'"{name}"')
        if problem:
            return problem
    if len(set(texts.values())) > 1:
        return Problem(f"{_both(texts)} differ", "Remove one of them.")
    return next(iter(texts.values()), "")


def with_system(row: dict[str, Any], turns: list[dict[str, Any]]) -> list[dict[str, Any]] | Problem:
    """Put the system prompt of an example before its turns."""
    text = system_of(row)
    if isinstance(text, Problem):
        return text
    own = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
    if not text or own[:1] == [text]:
        return turns
    if own:
        return Problem(
            '"system" differs from the system turn of the conversation', "Remove one of them."
        )
    return [{"role": "system", "content": text}, *turns]


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | Problem | None:
    """Return the tools of an example: a list or its JSON, or the older field `"functions"`."""
    found = []
    for name in TOOLS:
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = parse_json(value) if value.strip() else None
            except (ValueError, RecursionError):
                value = row[name]
        tools = check_tools(value, name)
        if isinstance(tools, Problem):
            return tools
        if name == "functions":
            tools = tools and [{"type": "function", "function": each} for each in tools]
        found.append(tools)
    if all(found):
        return Problem('"tools" and "functions" are both given', "Remove one of them.")
    return found[0] or found[1]


def history_of(row: dict[str, Any]) -> list[tuple[str, str]] | Problem:
    """Return the earlier turns of an Alpaca example: pairs of a question and an answer."""
    pairs = row.get("history") or []
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    )
    if not good:
        return Problem(
            '"history" is not a list of pairs of strings', 'Write [["question", "answer"]].'
        )
    for text in (text for pair in pairs for text in pair):
        problem = check_characters(text, '"history"')
        if problem:
            return problem
    return [(question, answer) for question, answer in pairs]


def _both(names: Iterable[str]) -> str:
    return " and ".join(f'"{name}"' for name in names)


def _shown(row: dict[str, Any]) -> str:
    names = ("messages", "conversations", "prompt", "instruction", "question", "text", "text_a")
    return next((f'"{name}"' for name in names if name in row), "the text")
