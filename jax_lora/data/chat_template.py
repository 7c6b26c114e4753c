"""Render conversations with the chat template of a tokenizer.

A template is untrusted code that comes with a model. It runs in the sandbox of jinja2, in a process
with limits on time, memory and output.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

from jax_lora.data.template_process import (
    LimitError,
    RenderError,
    TemplateLimits,
    TemplateProcess,
)
from jax_lora.data.template_worker import JSON
from jax_lora.errors import DataError, LoraError, ModelError, format_error
from jax_lora.storage.limits import limit, raise_hint

# In the order of precedence.
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


class Rendering(NamedTuple):
    """A conversation to render: the arguments of `ChatTemplate.render`."""

    messages: list[dict[str, Any]]
    answer_next: bool = False
    tools: Any = None


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
      folder: The model's folder.

    Raises:
      ModelError: There is no template, it is too large, or transformers is not installed or refuses
        the folder.
    """

    def __init__(self, folder: Path):
        """Load the template and the special tokens that it uses."""
        self._file = next((folder / name for name in FILES if (folder / name).is_file()), folder)
        _check_size(self._file, _size(folder / FILES[0]))
        self._tokenizer = _load(folder)
        self._processes: dict[str, TemplateProcess] = {}
        self._ahead: dict[str, dict[str, str]] = {}

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
          DataError: The template rejects the conversation, or exceeds a limit.
          ModelError: The template is larger than its limit.
        """
        if not messages:
            raise self._refused("a conversation without turns")
        answer = self._ask(Rendering(messages, answer_next, tools))
        if "error" in answer:
            raise self._refused(answer["error"])
        if "limit" in answer:
            raise self._over(answer["limit"])
        return answer["text"]

    def render_ahead(self, renderings: list[Rendering]) -> None:
        """Render conversations that `render` is about to be called with, in one go.

        It is several times as fast, as each exchange with the process takes longer than a
        rendering. It raises no error: `render` does.

        Args:
          renderings: The arguments of the calls.
        """
        self._ahead = {}
        requests: dict[TemplateProcess, list[str]] = {}
        for each in renderings:
            if each.messages:
                with contextlib.suppress(LoraError):
                    requests.setdefault(self._process(each.tools), []).append(_request(each))
        for process, batch in requests.items():
            with contextlib.suppress(RenderError):
                self._ahead |= zip(batch, process.render(batch), strict=False)

    def _ask(self, rendering: Rendering) -> dict[str, str]:
        process, request = self._process(rendering.tools), _request(rendering)
        answer = self._ahead.get(request)
        try:
            return answer or process.render([request])[0]
        except LimitError as error:
            return {"limit": error.name}
        except RenderError as error:
            return {"error": str(error)}

    def _process(self, tools: Any) -> TemplateProcess:
        """Return the process of a template; some tokenizers have another template for tools."""
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several templates, and none is the default
            raise self._refused(str(error)) from error
        if template not in self._processes:
            _check_size(self._file, len(template.encode("utf-8", "surrogatepass")))
            tokens = dict(self._tokenizer.special_tokens_map)
            limits = TemplateLimits.configured()
            self._processes[template] = TemplateProcess(template, tokens, limits)
        return self._processes[template]

    @property
    def _where(self) -> str:
        return f"the chat template of {self._file}"

    def _over(self, name: str) -> DataError:
        return DataError(
            format_error(
                self._where,
                got=f"a rendering beyond the limit {name}",
                expected=f"at most {limit(name):,}",
                fix=raise_hint(name),
            )
        )

    def _refused(self, got: str) -> DataError:
        return DataError(
            format_error(
                self._where,
                got=got[:300],
                expected="a conversation that the template accepts",
                fix="Change the order or the roles of the turns.",
            )
        )


def _request(rendering: Rendering) -> str:
    turns, answer_next, tools = rendering
    messages = [{name: turn[name] for name in turn if name != "weight"} for turn in turns]
    names = {"messages": messages, "tools": tools, "documents": None}
    return JSON.encode(names | {"add_generation_prompt": answer_next})


def _check_size(file: Path, size: int) -> None:
    if size > limit("template_bytes"):
        raise ModelError(
            format_error(
                f"the chat template of {file}",
                got=f"{size:,} bytes",
                expected=f"at most {limit('template_bytes'):,}",
                fix=raise_hint("template_bytes"),
            )
        )


def _load(folder: Path) -> Any:
    try:
        AutoTokenizer = _auto_tokenizer()
        if importlib.util.find_spec("jinja2") is None:
            raise ModuleNotFoundError(name="jinja2")
    except ImportError as error:
        raise ModelError(
            format_error(
                "chat rows",
                got=f"the package {error.name or 'transformers'} is not installed",
                expected="transformers and jinja2, which load and render chat templates",
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
