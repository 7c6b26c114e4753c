"""Render conversations with chat templates, in the sandbox of transformers.

A template is untrusted code that comes with a model. The sandbox gives it no access to files or
Python objects. This module also limits its run time and the length of its output.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jax_lora.data.bounds import time_limit
from jax_lora.errors import DataError, ModelError, format_error

SECONDS = 10.0  # per conversation; templates need about 0.01 seconds
LONGEST = 2**24  # characters
LARGEST_TEMPLATE = 2**20  # bytes
FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
      folder: The model's folder.

    Raises:
      ModelError: There is no template, or transformers is not installed or refuses the folder.
    """

    def __init__(self, folder: Path):
        """Load the tokenizer that renders the template."""
        self._folder = folder
        self._tokenizer = _load(folder)

    def render(
        self, messages: list[dict[str, Any]], *, answer_next: bool = False, tools: Any = None
    ) -> str:
        """Render a conversation as text.

        Args:
          messages: Turns with `role` and `content`.
          answer_next: Append the prefix of an assistant turn (the generation prompt).
          tools: Descriptions of the tools that the model may call.

        Returns:
          The text that the model sees.

        Raises:
          DataError: The template rejects the conversation, or exceeds its time limit.
        """
        try:
            with time_limit(SECONDS):
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=answer_next, tools=tools
                )
        except Exception as error:  # a template can raise any exception
            raise self._refused(str(error) or type(error).__name__) from error
        if len(text) > LONGEST:
            raise self._refused(f"{len(text):,} characters")
        return text

    def _refused(self, got: str) -> DataError:
        return DataError(
            format_error(
                f"the chat template of {self._folder}",
                got=got[:300],
                expected="a conversation that the template accepts",
                fix="Change the order or the roles of the turns.",
            )
        )


def _load(folder: Path) -> Any:
    large = [file for file in FILES[:1] if _size(folder / file) > LARGEST_TEMPLATE]
    if large:
        raise _unusable(folder, f"{large[0]} of more than {LARGEST_TEMPLATE:,} bytes")
    try:
        AutoTokenizer = _auto_tokenizer()
    except ImportError as error:
        raise ModelError(
            format_error(
                "chat rows",
                got="the package transformers is not installed",
                expected="transformers, which renders chat templates",
                fix="pip install 'jax-lora[cli]'",
            )
        ) from error
    try:
        # Code in a model folder is never run.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # untrusted files can cause any exception
        raise _unusable(folder, f"{type(error).__name__}: {str(error)[:200]}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            format_error(
                str(folder),
                got="a tokenizer without a chat template (this is a base model)",
                expected='a template, as the data has "messages"',
                fix='Take an instruction-tuned model, or write the rows as "prompt" and '
                '"completion".',
            )
        )
    return tokenizer


def _auto_tokenizer() -> Any:
    """Import transformers without its advice to install a deep learning framework."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return AutoTokenizer


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _unusable(folder: Path, got: str) -> ModelError:
    return ModelError(
        format_error(
            f"the tokenizer of {folder}",
            got=got,
            expected="a tokenizer that transformers loads without running code from the folder",
            fix="Copy the tokenizer's files from the model's own folder.",
        )
    )
