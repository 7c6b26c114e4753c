"""Render conversations with the chat template of a tokenizer.

A template is untrusted code that comes with a model. It runs in the sandbox of jinja2, in a process
with limits on time, memory and output.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from jax_lora.data.special_tokens import all_special_tokens
from jax_lora.data.template_files import DEFAULT, TOOLS, read_templates, source_of
from jax_lora.data.template_process import LimitError, RenderError, TemplateLimits, TemplateProcess
from jax_lora.data.template_worker import JSON
from jax_lora.errors import DataError, LoraError, ModelError, install_command
from jax_lora.storage.limits import limit, limit_hint


class Rendering(NamedTuple):
    """A conversation to render: the arguments of `ChatTemplate.render`."""

    messages: list[dict[str, Any]]
    answer_next: bool = False
    tools: Any = None


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
      folder: The model's folder.
      template: The text of another template than those of the folder, or None.

    Raises:
      ModelError: There is no template, a file is damaged or too large, or jinja2 is not installed.
    """

    def __init__(self, folder: Path, template: str | None = None):
        """Read the templates and the special tokens that they use."""
        if importlib.util.find_spec("jinja2") is None:
            raise ModelError(
                "chat rows",
                got="the package jinja2 is not installed",
                expected="jinja2, which renders chat templates",
                fix=install_command("cli"),
            )
        source = source_of(folder) if template is None else "this run"
        self._where = f"the chat template of {source}"
        self._templates = read_templates(folder) if template is None else {DEFAULT: template}
        if not any(self._templates.values()):
            raise ModelError(
                str(folder),
                got="a tokenizer without a chat template (this is a base model)",
                expected='a template, as the data has "messages"',
                fix="Use an instruction-tuned model, set chat_template or prompt_template, or "
                'write the rows as "prompt" and "completion".',
            )
        self._tokens = all_special_tokens(folder)
        self._processes: dict[str, TemplateProcess] = {}
        self._ahead: dict[str, dict[str, str]] = {}

    def render(
        self, messages: list[dict[str, Any]], *, answer_next: bool = False, tools: Any = None
    ) -> str:
        """Render a conversation as text, with the arguments of `Tokenizer.render`.

        Raises:
          DataError: The template rejects the conversation, or exceeds a limit.
          ModelError: The template is larger than its limit.
        """
        if not messages:
            raise self._refused("a conversation without turns")
        request = _request(Rendering(messages, answer_next, tools))
        try:
            answer = self._ahead.get(request) or self._process(tools).render([request])[0]
        except LimitError as error:
            raise self._over(error.name) from error
        except RenderError as error:
            raise self._refused(str(error)[:300]) from error
        if "error" in answer:
            raise self._refused(answer["error"][:300])
        if "limit" in answer:
            raise self._over(answer["limit"])
        return answer["text"]

    def render_ahead(self, renderings: list[Rendering]) -> None:
        """Render conversations that `render` is about to be called with, in one go.

        It is several times as fast, as each exchange with the process takes longer than a
        rendering. It raises no error: `render` does.
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

    def _process(self, tools: Any) -> TemplateProcess:
        """Return the process of a template; some tokenizers have another template for tools."""
        name = TOOLS if tools is not None and TOOLS in self._templates else DEFAULT
        if name not in self._templates:
            names = ", ".join(sorted(self._templates))
            raise self._refused(
                f"several templates, and none is the default: {names}",
                expected="the name of one of them",
                fix=f"Choose one as chat_template, such as {min(self._templates)}.",
            )
        template = self._templates[name]
        if template not in self._processes:
            size, most = len(template.encode("utf-8", "surrogatepass")), limit("template_bytes")
            if size > most:
                raise ModelError(
                    self._where,
                    got=f"{size:,} bytes",
                    expected=f"at most {most:,}",
                    fix=limit_hint("template_bytes"),
                )
            kinds = ("template_seconds", "template_memory_bytes", "template_output_bytes")
            limits = TemplateLimits(*map(limit, kinds))
            self._processes[template] = TemplateProcess(template, self._tokens, limits)
        return self._processes[template]

    def _over(self, name: str) -> DataError:
        got, most = f"a rendering beyond the limit {name}", f"at most {limit(name):,}"
        return self._refused(got, most, limit_hint(name))

    def _refused(
        self,
        got: str,
        expected: str = "a conversation that the template accepts",
        fix: str = "Change the order or the roles of the turns.",
    ) -> DataError:
        return DataError(self._where, got=got, expected=expected, fix=fix)


def _request(rendering: Rendering) -> str:
    turns, answer_next, tools = rendering
    messages = [{name: turn[name] for name in turn if name != "weight"} for turn in turns]
    names = {"messages": messages, "tools": tools, "documents": None}
    return JSON.encode(names | {"add_generation_prompt": answer_next})
