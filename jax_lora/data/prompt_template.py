"""The prompt format of a model without a chat template: a text with `{prompt}` and `{system}`."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from jax_lora.data.template_files import read_template
from jax_lora.errors import ConfigError, DataError

PROMPT, SYSTEM = "prompt", "system"


class PromptTemplate:
    r"""Format prompts, and conversations of a user and an assistant.

    Without a system message, `{system}` and the white space after it are left out. Two braces are
    one literal brace.

    Args:
      text: The template, with `{prompt}` and optionally `{system}`.

    Raises:
      ConfigError: The template has another field, or not exactly one `{prompt}`.

    Example:
      >>> template = PromptTemplate("{system}\n\nQuestion: {prompt}\nAnswer:")
      >>> template.format("2 + 3?")
      'Question: 2 + 3?\nAnswer:'
    """

    def __init__(self, text: str):
        """Parse the template."""
        self.text = text
        try:
            parts = list(string.Formatter().parse(text)) if isinstance(text, str) else []
        except ValueError as error:
            raise _refused(text, str(error)) from error
        self._parts = [(before, name) for before, name, _, _ in parts]
        names = [name for _, name in self._parts if name is not None]
        for name in names:
            if name not in (PROMPT, SYSTEM):
                raise _refused(text, f"the field {'{' + name + '}'}")
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise _refused(text, "a field with a format")
        if names.count(PROMPT) != 1 or names.count(SYSTEM) > 1:
            raise _refused(text, f"{names.count(PROMPT)} times {{prompt}}")
        self._has_system = SYSTEM in names

    def format(self, prompt: str, system: str = "") -> str:
        """Return the text that a completion follows.

        Raises:
          DataError: There is a system message, and the template has no `{system}`.
        """
        if system and not self._has_system:
            raise DataError(
                "the system message",
                got="a prompt template without {system}",
                expected="a template with {system}",
                fix="Add {system} to the prompt template, or remove the system message.",
            )
        values = {PROMPT: prompt, SYSTEM: system}
        text, skipping = "", False
        for before, name in self._parts:
            text += before.lstrip() if skipping else before
            text += values.get(name or "", "")
            skipping = name == SYSTEM and not system
        return text

    def render(self, messages: list[dict[str, Any]], end: str) -> str:
        """Return a conversation: for each round the formatted prompt, the response and its end.

        Args:
          messages: Turns with `role` and `content`: one of the system or none, then user and
            assistant in turn.
          end: Text of the end token, which follows every response.

        Returns:
          The text.

        Raises:
          DataError: The conversation has other turns.
        """
        text, system, expected = "", "", "user"
        for index, turn in enumerate(messages):
            role, content = turn["role"], turn["content"]
            if index == 0 and role in (SYSTEM, "developer"):
                system = content
                continue
            if role != expected or turn.get("tool_calls"):
                raise DataError(
                    f"turn {index} of the conversation",
                    got=f"the role {role!r}",
                    expected=f"{expected!r}: a prompt template formats user and assistant in turn",
                    fix="Use a chat template, which supports other conversations.",
                )
            if role == "user":
                text, system, expected = text + self.format(content, system), "", "assistant"
            else:
                text, expected = text + content + end, "user"
        return text


def prompt_template_text(value: str, *, escaped: bool = True) -> str:
    r"""Return the template that an option names: a text with a field, or a file.

    Args:
      value: The template; or the path of a file. The newline at the end of a file is not part of
        the template.
      escaped: In a text, `\n` is a newline.

    Returns:
      The template.

    Raises:
      ConfigError: There is no such file, or it is too large.
    """
    if "{" in value:
        return value.replace("\\n", "\n") if escaped else value
    return read_template(Path(value), ConfigError).removesuffix("\n")


def _refused(text: Any, got: str) -> ConfigError:
    return ConfigError(
        f"prompt_template {text!r:.200}",
        got=got,
        expected="{prompt} once, {system} at most once, and no other field",
        fix="Write {{ and }} for literal braces, as in 'Question: {prompt}\\nAnswer:'.",
    )
