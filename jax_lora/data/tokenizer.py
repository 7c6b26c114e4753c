"""Load a tokenizer from a Hugging Face folder, with BOS handling and chat templates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_lora.data.chat_template import ChatTemplate, Rendering
from jax_lora.data.prompt_template import PromptTemplate
from jax_lora.data.special_tokens import all_special_tokens, read_special_tokens
from jax_lora.data.tokenizer_backend import (
    check_embedded,
    check_special,
    embedded_tokens,
    eos_of_model,
    library_errors,
    read_backend,
)
from jax_lora.errors import DataError, ModelError, format_error
from jax_lora.storage.safe_paths import given_path

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Encode text to ids and decode ids to text, with at most one BOS token.

    Args:
      backend: A `tokenizers.Tokenizer`.
      folder: The tokenizer's folder. The chat template is loaded from it on first use.
      eos: Text of the EOS token.
      bos: Text of the BOS token, or None.
      chat_template: Another chat template than the folder's, or None.
      prompt_template: The format of prompts, instead of a chat template, or None.

    Example:
      >>> import jax_lora.bundled
      >>> tokenizer = Tokenizer.load(jax_lora.bundled.model_path())
      >>> tokenizer.decode(tokenizer.encode("select name from books"))
      'select name from books'
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: Path,
        *,
        eos: str,
        bos: str | None,
        chat_template: str | None = None,
        prompt_template: str | None = None,
    ):
        """Look up the special tokens."""
        self._backend, self._folder = backend, folder
        self.chosen_template = chat_template
        self._prompts = None if prompt_template is None else PromptTemplate(prompt_template)
        self._embedded = embedded_tokens(folder)
        self.eos_text = eos
        self.eos_id = self._id(eos)
        # A tokenizer can define BOS without adding it (GPT-2), so the backend's output decides.
        with library_errors(folder):
            starts = backend.encode("a").ids[:1]
        uses_bos = bos is not None and starts == [self._id(bos)]
        self.bos_id = starts[0] if uses_bos else None

    @classmethod
    def load(cls, folder: str | Path, **templates: str | None) -> Tokenizer:
        """Load the tokenizer and the special tokens of a folder.

        Args:
          folder: A Hugging Face folder.
          **templates: `chat_template` and `prompt_template`, as in the class.

        Returns:
          The tokenizer.

        Raises:
          ModelError: A file is missing or damaged, no EOS token is defined, or a special token
            has no embedding in the model.
        """
        folder = given_path(folder, ModelError)
        backend, special = read_backend(folder), read_special_tokens(folder)
        usual = all_special_tokens(folder)
        eos = special.get("eos_token") or eos_of_model(folder, backend) or usual.get("eos_token")
        if eos is None or backend.token_to_id(eos) is None:
            raise ModelError(
                format_error(
                    str(folder / "tokenizer_config.json"),
                    got=f"eos_token {eos!r}",
                    expected="an EOS token that is in the vocabulary, so that generation can stop",
                    fix='Add "eos_token" to tokenizer_config.json.',
                )
            )
        tokenizer = cls(backend, folder, eos=eos, bos=usual.get("bos_token"), **templates)
        for role, index in (("eos", tokenizer.eos_id), ("bos", tokenizer.bos_id)):
            check_special(folder, role, index, tokenizer._embedded, backend)
        return tokenizer

    @property
    def size(self) -> int:
        """Return the vocabulary size, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Encode text, with one leading BOS if the tokenizer uses BOS.

        Args:
          text: Any text; it may already begin with BOS, for example from a chat template.

        Returns:
          The ids.

        Raises:
          DataError: The text begins with two BOS tokens.
        """
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Encode text, and return the end offset of every token in characters.

        Args:
          text: Any text.

        Returns:
          The ids, and the end offset of each.

        Raises:
          DataError: A token has no embedding in the model, or the text begins with two BOS tokens.
        """
        with library_errors(self._folder):
            encoding = self._backend.encode(text, add_special_tokens=False)
        ids, ends = list(encoding.ids), [end for _, end in encoding.offsets]
        check_embedded(ids, self._embedded, self._backend)
        if self.bos_id is None:
            return ids, ends
        if ids[:2] == [self.bos_id, self.bos_id]:
            raise DataError(
                format_error(
                    f"the text {text[:60]!r}",
                    got="two BOS tokens at the start",
                    expected="exactly one",
                    fix="Remove BOS from the text or from the chat template.",
                )
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

    def decode(self, ids: list[int]) -> str:
        """Decode ids, without special tokens."""
        with library_errors(self._folder):
            return self._backend.decode(list(ids), skip_special_tokens=True)

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
                format_error(
                    '"tools"',
                    got="a prompt template, which does not show them",
                    expected="a chat template that writes the descriptions of tools",
                    fix='Use a chat template, or remove "tools".',
                )
            )
        return self._prompts.render(messages, self.eos_text)

    def render_ahead(self, renderings: list[Rendering]) -> None:
        """Render conversations that `render` is about to be called with, in one go.

        Args:
          renderings: The arguments of the calls.

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

    def _id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        return -1 if index is None else index
