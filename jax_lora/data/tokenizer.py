"""Load a tokenizer from a Hugging Face folder, with BOS handling and chat templates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jax_lora.data.base_tokenizer import BaseTokenizer
from jax_lora.data.chat_template import ChatTemplate, Rendering
from jax_lora.data.prompt_template import PromptTemplate
from jax_lora.data.special_tokens import (
    SETTINGS,
    all_special_tokens,
    read_settings,
    read_special_tokens,
)
from jax_lora.data.tokenizer_backend import library_errors
from jax_lora.errors import DataError, ModelError
from jax_lora.storage import schema

_INDEX = schema.integer(0, 2**31 - 1)
_MODEL_EOS = schema.fields(
    {"eos_token_id": schema.optional(schema.either(_INDEX, schema.list_of(_INDEX)))}
)


class Tokenizer(BaseTokenizer):
    """Encode text to ids and decode ids to text, with at most one BOS token.

    Args:
      folder: A Hugging Face folder. Its chat template is loaded on first use.
      chat_template: Another chat template than the folder's, or None.
      prompt_template: The format of prompts, instead of a chat template, or None.

    Raises:
      ModelError: A file is missing or damaged, no EOS token is defined, or a special token has no
        embedding in the model.

    Example:
      >>> import jax_lora.bundled
      >>> tokenizer = Tokenizer.load(jax_lora.bundled.model_path())
      >>> tokenizer.decode(tokenizer.encode("select name from books"))
      'select name from books'
    """

    def __init__(
        self, folder: Path, *, chat_template: str | None = None, prompt_template: str | None = None
    ):
        """Look up the special tokens."""
        super().__init__(folder)
        special, usual = read_special_tokens(folder), all_special_tokens(folder)
        eos = special.get("eos_token") or self._eos_of_model() or usual.get("eos_token")
        eos_id = None if eos is None else self._backend.token_to_id(eos)
        if eos is None or eos_id is None:
            raise ModelError(
                str(folder / SETTINGS),
                got=f"eos_token {eos!r}",
                expected="an EOS token that is in the vocabulary, so that generation can stop",
                fix='Add "eos_token" to tokenizer_config.json.',
            )
        self.chosen_template = chat_template
        self._prompts = None if prompt_template is None else PromptTemplate(prompt_template)
        self.eos_text, self.eos_id = eos, eos_id
        # A tokenizer can define BOS without adding it (GPT-2), so the backend's output decides.
        with library_errors(folder):
            starts = self._backend.encode("a").ids[:1]
        bos = usual.get("bos_token")
        uses_bos = bos is not None and starts == [self._backend.token_to_id(bos)]
        self.bos_id = starts[0] if uses_bos else None
        self._check_special("eos", self.eos_id)
        self._check_special("bos", self.bos_id)

    def _eos_of_model(self) -> str | None:
        """Return the text of the EOS token in config.json, the first if there are several."""
        index = read_settings(self._folder / "config.json", _MODEL_EOS).get("eos_token_id")
        index = (index[0] if index else None) if isinstance(index, list) else index
        return None if index is None else self._backend.id_to_token(index)

    def encode(self, text: str) -> list[int]:
        """Encode text, with one leading BOS if the tokenizer uses BOS.

        Args:
          text: Any text; it may already begin with BOS, for example from a chat template.

        Returns:
          The ids.

        Raises:
          DataError: A token has no embedding in the model, or the text begins with two BOS tokens.
        """
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Encode text as `encode` does; return the ids, and the end of each in characters."""
        with library_errors(self._folder):
            encoding = self._backend.encode(text, add_special_tokens=False)
        ids, ends = list(encoding.ids), [end for _, end in encoding.offsets]
        self._check_embedded(ids)
        if self.bos_id is None:
            return ids, ends
        if ids[:2] == [self.bos_id, self.bos_id]:
            raise DataError(
                f"the text {text[:60]!r}",
                got="two BOS tokens at the start",
                expected="exactly one",
                fix="Remove BOS from the text or from the chat template.",
            )
        if ids[:1] == [self.bos_id]:
            return ids, ends
        return [self.bos_id, *ids], [0, *ends]

    def format_prompt(self, prompt: str, system: str = "") -> str:
        """Return a prompt in the format of the prompt template, if there is one.

        Args:
          prompt: The prompt.
          system: The system message, for a prompt template.

        Returns:
          The text that a completion follows.

        Raises:
          DataError: There is a system message, and no prompt template with `{system}`.
        """
        return (self._prompts or PromptTemplate("{prompt}")).format(prompt, system)

    @property
    def formats_prompts(self) -> bool:
        """Return whether there is a prompt template."""
        return self._prompts is not None

    def decode_all(self, ids: list[int]) -> str:
        """Decode ids, special tokens included."""
        with library_errors(self._folder):
            return self._backend.decode(list(ids), skip_special_tokens=False)

    def ids_containing(self, text: str) -> list[int]:
        """Return the ids of the tokens whose text contains `text`, such as a newline."""
        with library_errors(self._folder):
            return [index for index in range(self.size) if text in self._backend.decode([index])]

    def render(
        self, messages: list[dict[str, Any]], *, answer_next: bool = False, tools: Any = None
    ) -> str:
        """Render a conversation with the tokenizer's chat template.

        Args:
          messages: Turns with `role` and `content`.
          answer_next: Append the prefix of an assistant turn (the generation prompt).
          tools: Descriptions of the tools that the model may call.

        Returns:
          The text that the model sees.

        Raises:
          ModelError: The tokenizer has no chat template.
          DataError: The template rejects the conversation.
        """
        if self._prompts is None:
            return self._chat_template.render(messages, answer_next=answer_next, tools=tools)
        if tools:
            raise DataError(
                '"tools"',
                got="a prompt template, which does not show them",
                expected="a chat template that writes the descriptions of tools",
                fix='Use a chat template, or remove "tools".',
            )
        return self._prompts.render(messages, self.eos_text)

    def render_ahead(self, renderings: list[Rendering]) -> None:
        """Render conversations that `render` is about to be called with, in one go.

        Raises:
          ModelError: The tokenizer has no chat template.
        """
        if self._prompts is None:
            self._chat_template.render_ahead(renderings)

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._folder, self.chosen_template)

    def is_special(self, index: int) -> bool:
        """Return whether a token is special, such as an end-of-turn token."""
        return index in self._special

    @functools.cached_property
    def _special(self) -> set[int]:
        added = self._backend.get_added_tokens_decoder()
        return {index for index, token in added.items() if token.special}
