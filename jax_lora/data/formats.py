"""The formats of examples, detected by the keys of each example.

{"messages": [...], "tools": [...]}                    chat
{"prompt": "...", "completion": "..."}                 completions; lists of turns: chat
{"text": "..."}                                        text
{"text": "...", "label": "..."}                        labeled, for classification
{"text_a": "...", "text_b": "...", "label": "..."}     labeled pairs; "label" is optional
{"instruction": ..., "input": ..., "output": ...}      Alpaca; converted to completions
{"instruction": ..., "context": ..., "response": ...}  Dolly; converted like Alpaca
{"question": ..., "context": ..., "answer": ...}       questions; converted like Alpaca
{"conversations": [{"from": ..., "value": ...}]}       ShareGPT; converted to chat
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from itertools import islice
from typing import Any

from jax_lora.data.context_fields import (
    SYSTEM,
    TOOLS,
    check_other_fields,
    history_of,
    system_of,
    tools_of,
    with_system,
)
from jax_lora.data.problem import Problem, check_text, kind_of
from jax_lora.data.turns import check_turns, parsed_json, target_turns, without_foreign_arguments

Checked = tuple[str, dict[str, Any]]

SHOWN_NAMES, LONGEST_NAME = 10, 80  # of fields, in messages

# Roles of ShareGPT -> roles of chat templates.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def check_fields(value: Any) -> Checked:
    """Detect the format of an example, check its fields, and convert it.

    Args:
      value: Any JSON value.

    Returns:
      The format (`"completions"`, `"text"`, `"labeled"` or `"chat"`) and the fields, including
      unused ones.

    Raises:
      Problem: The fields are of no known format, or a field is invalid.

    Example:
      >>> check_fields({"text": "Once upon a time"})[0]
      'text'
      >>> check_fields({"instruction": "Add.", "input": "2 3", "output": "5"})[1]["completion"]
      '5'
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise Problem(f"a JSON {kind} where an object is needed", 'Write {"text": "..."}.')
    for keys, check in _FORMATS:
        if keys <= {*value}:
            return check(value)
    names = tuple(str(name)[:LONGEST_NAME] for name in islice(value, SHOWN_NAMES))
    fields = ", ".join(f'"{name}"' for name in names) or "none"
    raise Problem(f"no known format; the fields are {fields}", _fix(names))


def unused_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a checked example that no format uses."""
    return {name: value for name, value in fields.items() if name not in _USED}


@functools.lru_cache
def _fix(names: tuple[str, ...]) -> str:
    """Suggest a correction of a misspelled name, or the supported names and --columns."""
    columns = ""
    if len(names) > 1:
        columns = f" Or name the columns, for example prompt={names[0]},completion={names[1]}."
    known = [key for keys, _ in _FORMATS for key in keys]
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near and name not in known:
            corrected = {*names} - {name} | {near[0]}
            is_sure = any(len(keys) > 1 and keys <= corrected for keys, _ in _FORMATS)
            return f'"{name}": did you mean "{near[0]}"?{"" if is_sure else columns}'
    return f'Name the fields "prompt" and "completion", or "text", or "messages".{columns}'


def _chat(row: dict[str, Any]) -> Checked:
    return _conversation(row, check_turns(row["messages"], '"messages"'))


def _conversation(row: dict[str, Any], turns: list[dict[str, Any]], learn_from: int = 0) -> Checked:
    check_other_fields(row, (*SYSTEM, *TOOLS))
    tools = tools_of(row)
    both = without_foreign_arguments(with_system(row, turns), tools)
    if learn_from:  # the system prompt may have become a turn before the others
        learn_from += len(both) - len(turns)
    if not any(turn["role"] == "assistant" for turn in both[learn_from:]):
        raise Problem(
            'no turn has the role "assistant": no target tokens', "Add an assistant turn."
        )
    if not target_turns(both, learn_from):
        raise Problem("every response has a weight of 0: no target tokens", "Delete the example.")
    fields = {name: row[name] for name in row if name not in (*SYSTEM, *TOOLS, "conversations")}
    return "chat", fields | {"messages": both, "tools": tools, "learn_from": learn_from}


def _completion(row: dict[str, Any]) -> Checked:
    names = ("prompt", "completion")
    if all(isinstance(row[name], list) for name in names):
        prompt, completion = (check_turns(row[name], f'"{name}"') for name in names)
        return _conversation(row, prompt + completion, learn_from=len(prompt))
    for name in names:
        check_text(row, name, may_be_empty=name == "prompt")
    check_other_fields(row, ())
    return "completions", row


def _text(row: dict[str, Any]) -> Checked:
    check_text(row, "text")
    check_other_fields(row, ())
    return "text", row


def _labeled(row: dict[str, Any]) -> Checked:
    """Check a text, or a pair of texts, with an optional class, which becomes a string."""
    names = ("text_a", "text_b") if "text_a" in row else ("text",)
    for name in names:
        check_text(row, name, may_be_empty=name == "text_b")
    label = row.get("label")
    if label is None:
        return "labeled", row
    # A class is a string in CSV, and a string, an integer or a boolean in JSON.
    if not isinstance(label, str | int) or label == "":
        raise Problem(f'"label" is {kind_of(label)}, not a class', "Write a name or an integer.")
    name = str(label).lower() if isinstance(label, bool) else str(label)
    return "labeled", row | {"label": name}


def _question(question: str, context: str, answer: str) -> Callable[[dict[str, Any]], Checked]:
    """Check a question, an optional context and an answer, in the layout of Alpaca."""

    def check(row: dict[str, Any]) -> Checked:
        for name in (question, answer):
            check_text(row, name)
        given = row.get(context) or ""
        if row.get(context) is not None:
            check_text(row, context, may_be_empty=True)
        check_other_fields(row, (*SYSTEM, "history"))
        system, history = system_of(row), history_of(row)
        question_given = (row[question].strip(), given.strip())
        rest = {name: row[name] for name in row if name not in (*SYSTEM, "history")}
        return "completions", rest | {
            "prompt": _layout(system, history, *question_given),
            "completion": row[answer],
            "turns": _as_turns(system, history, question_given, row[answer]),
        }

    return check


def _layout(system: str, history: list[tuple[str, str]], question: str, given: str) -> str:
    parts = [system.strip()] if system.strip() else []
    for asked, answered in history:
        parts += [f"### Instruction:\n{asked.strip()}", f"### Response:\n{answered.strip()}"]
    parts += [f"### Instruction:\n{question}"]
    parts += [f"### Input:\n{given}"] if given else []
    return "\n\n".join([*parts, "### Response:\n"])


def _as_turns(
    system: str, history: list[tuple[str, str]], question: tuple[str, str], answer: str
) -> list[dict[str, Any]]:
    """Return the conversation as turns, for templates: without the headings of `_layout`."""
    said = [("system", system)] if system else []
    for asked, answered in history:
        said += [("user", asked), ("assistant", answered)]
    said += [("user", "\n\n".join(text for text in question if text)), ("assistant", answer)]
    return [{"role": role, "content": text} for role, text in said]


def _sharegpt(row: dict[str, Any]) -> Checked:
    entries = row["conversations"]
    if not isinstance(entries, list) or not entries:
        raise Problem(
            f'"conversations" is {kind_of(entries)}, not a list of turns',
            'Write [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}].',
        )
    turns = []
    for index, each in enumerate(entries):
        where = f'"conversations"[{index}]'
        if not isinstance(each, dict) or not {"from", "value"} <= {*each}:
            raise Problem(f'{where} has no "from" and "value"', "Add both fields.")
        turn = _sharegpt_turn(each)
        if turn is None:
            known = ", ".join(SPEAKERS)
            raise Problem(f"{where}: unknown speaker {each['from']!r:.40}", f"Use one of {known}.")
        turns.append(turn)
    return _conversation(row, check_turns(turns, '"conversations"'))


def _sharegpt_turn(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Convert an entry to a turn with its other fields; None for an unknown speaker."""
    role = SPEAKERS.get(entry["from"]) if isinstance(entry["from"], str) else None
    if role is None:
        return None
    rest = {name: entry[name] for name in entry if name not in ("from", "value")}
    if entry["from"] != "function_call":
        return rest | {"role": role, "content": entry["value"]}
    call = parsed_json(entry["value"])
    calls = call if isinstance(call, list) else [call]
    wrapped = [{"type": "function", "function": each} for each in calls]
    return rest | {"role": role, "content": None, "tool_calls": wrapped}


# Required keys -> check; the first match is used.
_FORMATS: tuple[tuple[set[str], Callable[[dict[str, Any]], Checked]], ...] = (
    ({"messages"}, _chat),
    ({"conversations"}, _sharegpt),
    ({"prompt", "completion"}, _completion),
    ({"instruction", "output"}, _question("instruction", "input", "output")),
    ({"instruction", "response"}, _question("instruction", "context", "response")),
    ({"question", "answer"}, _question("question", "context", "answer")),
    ({"text_a", "text_b"}, _labeled),
    ({"text", "label"}, _labeled),
    ({"text"}, _text),
)
_USED = frozenset(
    "messages tools learn_from turns prompt completion text label text_a text_b instruction input "
    "output context response question answer file".split()
)
