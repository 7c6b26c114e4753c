"""The formats that a row of data can have, found row by row, by its keys; and one form for each.

{"messages": [...], "tools": [...]}                    chat
{"prompt": "...", "completion": "..."}                 completions; lists of turns are a chat
{"text": "..."}                                        text
{"text": "...", "label": "..."}                        labeled, for classification
{"text_a": "...", "text_b": "...", "label": "..."}     labeled pairs; without "label" to predict
{"instruction": ..., "input": ..., "output": ...}      Alpaca, becomes a completion
{"conversations": [{"from": ..., "value": ...}]}       ShareGPT, becomes a chat
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from jax_lora.data.problem import Problem, check_text, kind_of
from jax_lora.data.turns import check_tools, check_turns

Checked = tuple[str, dict[str, Any]] | Problem

# What ShareGPT calls the roles.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def check_fields(value: Any) -> Checked:
    """Find the format of a row, check all that training will need from it, and bring it to a form.

    Args:
      value: Any JSON value.

    Returns:
      The form's name (`"completions"`, `"text"`, `"labeled"` or `"chat"`) and its fields, with all
      others of the row; or the problem.

    Example:
      >>> check_fields({"text": "Once upon a time"})[0]
      'text'
      >>> check_fields({"instruction": "Add.", "input": "2 3", "output": "5"})[1]["completion"]
      '5'
      >>> check_fields({"input": "a"}).reason
      'no known format; the fields are "input"'
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        return Problem(f"a JSON {kind} where an object is needed", 'Write {"text": "..."}.')
    for keys, check in _FORMATS:
        if keys <= {*value}:
            return check(value)
    fields = ", ".join(f'"{name}"' for name in list(value)[:10]) or "none"
    return Problem(f"no known format; the fields are {fields}", _fix(list(value)))


def _fix(names: list[str]) -> str:
    """Suggest the field name closest to a misspelled one, or list the supported fields."""
    known = [key for keys, _ in _FORMATS for key in keys]
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near and name not in known:
            return f'"{name}": did you mean "{near[0]}"?'
    return 'Name the fields "prompt" and "completion", or "text", or "messages".'


def _chat(row: dict[str, Any]) -> Checked:
    turns = check_turns(row["messages"], '"messages"')
    if isinstance(turns, Problem):
        return turns
    tools = check_tools(row.get("tools"))
    if isinstance(tools, Problem):
        return tools
    return _conversation(row, turns, tools)


def _conversation(
    row: dict[str, Any], turns: list[dict[str, Any]], tools: Any = None, learn_from: int = 0
) -> Checked:
    if not any(turn["role"] == "assistant" for turn in turns[learn_from:]):
        return Problem(
            'no turn has the role "assistant": no target tokens', "Add an assistant turn."
        )
    return "chat", row | {"messages": turns, "tools": tools, "learn_from": learn_from}


def _completion(row: dict[str, Any]) -> Checked:
    lists = [isinstance(row[name], list) for name in ("prompt", "completion")]
    if all(lists):
        return _completion_of_turns(row)
    for name in ("prompt", "completion"):
        problem = check_text(row, name, may_be_empty=name == "prompt")
        if problem:
            return problem
    return "completions", row


def _completion_of_turns(row: dict[str, Any]) -> Checked:
    both = []
    for name in ("prompt", "completion"):
        turns = check_turns(row[name], f'"{name}"')
        if isinstance(turns, Problem):
            return turns
        both.append(turns)
    tools = check_tools(row.get("tools"))
    if isinstance(tools, Problem):
        return tools
    prompt, completion = both
    return _conversation(row, prompt + completion, tools, learn_from=len(prompt))


def _text(row: dict[str, Any]) -> Checked:
    return check_text(row, "text") or ("text", row)


def _labeled(row: dict[str, Any]) -> Checked:
    """A text, or two, with the class as a string; a row to predict has none."""
    names = ("text_a", "text_b") if "text_a" in row else ("text",)
    for name in names:
        problem = check_text(row, name, may_be_empty=name == "text_b")
        if problem:
            return problem
    label = row.get("label")
    if label is None:
        return "labeled", row
    # JSON has names, numbers, and true or false; a CSV file has strings alone.
    if not isinstance(label, str | int) or label == "":
        return Problem(f'"label" is {kind_of(label)}, not a class', "Write a name or an integer.")
    name = str(label).lower() if isinstance(label, bool) else str(label)
    return "labeled", row | {"label": name}


def _alpaca(row: dict[str, Any]) -> Checked:
    for name in ("instruction", "output"):
        problem = check_text(row, name)
        if problem:
            return problem
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        return Problem(f'"input" is {kind_of(given)}, not a string', 'Make "input" a string.')
    task = f"### Instruction:\n{row['instruction'].strip()}\n\n"
    task += f"### Input:\n{given.strip()}\n\n" if given and given.strip() else ""
    return "completions", row | {
        "prompt": task + "### Response:\n",
        "completion": row["output"],
    }


def _sharegpt(row: dict[str, Any]) -> Checked:
    said = row["conversations"]
    if not isinstance(said, list) or not said:
        return Problem(
            f'"conversations" is {kind_of(said)}, not a list of turns',
            'Write [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}].',
        )
    turns = []
    for index, each in enumerate(said):
        where = f'"conversations"[{index}]'
        if not isinstance(each, dict) or not {"from", "value"} <= {*each}:
            return Problem(f'{where} has no "from" and "value"', "Give it both.")
        role = SPEAKERS.get(each["from"]) if isinstance(each["from"], str) else None
        if role is None:
            known = ", ".join(SPEAKERS)
            return Problem(f"{where}: unknown speaker {each['from']!r:.40}", f"Use one of {known}.")
        turns.append({"role": role, "content": each["value"]})
    checked = check_turns(turns, '"conversations"')
    return checked if isinstance(checked, Problem) else _conversation(row, checked)


# By the keys that a row must have; the first that fits.
_FORMATS: tuple[tuple[set[str], Callable[[dict[str, Any]], Checked]], ...] = (
    ({"messages"}, _chat),
    ({"conversations"}, _sharegpt),
    ({"prompt", "completion"}, _completion),
    ({"instruction", "output"}, _alpaca),
    ({"text_a", "text_b"}, _labeled),
    ({"text", "label"}, _labeled),
    ({"text"}, _text),
)
