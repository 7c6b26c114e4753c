"""Load a tokenizer from a Hugging Face folder, with BOS handling and chat templates."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_lora.data.chat_template import ChatTemplate
from jax_lora.errors import DataError, ModelError, format_error

if TYPE_CHECKING:
    import tokenizers

LARGEST_SETTINGS = 10_000_000  # bytes; real files are far smaller


class Tokenizer:
    """Encode text to ids and decode ids to text, with at most one BOS token.

    Args:
      backend: A `tokenizers.Tokenizer`.
      folder: The tokenizer's folder. The chat template is loaded from it on first use.
      eos: Text of the EOS token.
      bos: Text of the BOS token, or None.

    Example:
      >>> import jax_lora.bundled
      >>> tokenizer = Tokenizer.load(jax_lora.bundled.model_path())
      >>> tokenizer.decode(tokenizer.encode("select name from books"))
      'select name from books'
    """

    def __init__(self, backend: tokenizers.Tokenizer, folder: Path, *, eos: str, bos: str | None):
        """Look up the special tokens."""
        self._backend, self._folder = backend, folder
        self._template: ChatTemplate | None = None
        self.eos_text = eos
        self.eos_id = self._id(eos)
        # A tokenizer can define BOS without adding it (GPT-2), so the backend's output decides.
        starts = backend.encode("a").ids[:1]
        uses_bos = bos is not None and starts == [self._id(bos)]
        self.bos_id = starts[0] if uses_bos else None

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load `tokenizer.json` and the special tokens of a folder.

        Args:
          folder: A Hugging Face folder.

        Returns:
          The tokenizer.

        Raises:
          ModelError: A file is missing or damaged, or no EOS token is defined.
        """
        folder = Path(folder)
        backend, special = read_backend(folder), read_special_tokens(folder)
        eos = special.get("eos_token") or _eos_of_model(folder, backend)
        if eos is None or backend.token_to_id(eos) is None:
            raise ModelError(
                format_error(
                    str(folder / "tokenizer_config.json"),
                    got=f"eos_token {eos!r}",
                    expected="an EOS token that is in tokenizer.json, so that generation can stop",
                    fix='Add "eos_token" to tokenizer_config.json.',
                )
            )
        return cls(backend, folder, eos=eos, bos=special.get("bos_token"))

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
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, ends = list(encoding.ids), [end for _, end in encoding.offsets]
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

    def decode(self, ids: list[int]) -> str:
        """Decode ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decode_all(self, ids: list[int]) -> str:
        """Decode ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def ids_containing(self, text: str) -> list[int]:
        """Return the ids of the tokens whose text contains `text`, such as a newline."""
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
        if self._template is None:
            self._template = ChatTemplate(self._folder)
        return self._template.render(messages, answer_next=answer_next, tools=tools)

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


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read a folder's `tokenizer.json`, with truncation and padding switched off.

    Raises:
      ModelError: The file is missing or damaged.
    """
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(_cannot_read(file, "no such file"))
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ModelError(_cannot_read(file, str(error)[:200])) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Read the texts of the special tokens that a folder names, by role such as `"eos_token"`."""
    settings = _read_json(folder / "special_tokens_map.json")
    settings |= _read_json(folder / "tokenizer_config.json")
    texts = {name: _text_of(value) for name, value in settings.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _cannot_read(file: Path, got: str) -> str:
    return format_error(
        str(file),
        got=got,
        expected="a tokenizer in the format of the tokenizers library",
        fix="Copy tokenizer.json from the model's own folder.",
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > LARGEST_SETTINGS:
            raise ValueError(f"{file.stat().st_size} bytes are too many for settings")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            format_error(
                str(file),
                got=str(error)[:200],
                expected="a JSON object",
                fix="Copy the file from the model's own folder.",
            )
        ) from error
    return value if isinstance(value, dict) else {}


def _text_of(token: Any) -> str | None:
    """Return a special token's text: settings write it as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _eos_of_model(folder: Path, backend: tokenizers.Tokenizer) -> str | None:
    """Fall back on the id in config.json, the first if there are several."""
    index = _read_json(folder / "config.json").get("eos_token_id")
    index = index[0] if isinstance(index, list) and index else index
    return backend.id_to_token(index) if isinstance(index, int) and index >= 0 else None
