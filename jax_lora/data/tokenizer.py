"""A tokenizer from a Hugging Face folder: ids with exactly one BOS, and chat templates."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_lora.data.chat_template import ChatTemplate
from jax_lora.errors import DataError, ModelError, format_error

if TYPE_CHECKING:
    import tokenizers

LARGEST_SETTINGS = 10_000_000  # bytes; a template or two hundred special tokens are far below it


class Tokenizer:
    """Text to ids and back, as the model was trained to see them.

    Args:
      backend: What `tokenizers.Tokenizer.from_file` gives.
      folder: Where it came from; the chat template is read from there when it is needed.
      eos: The end token's text.
      bos: The start token's text, or None.

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
        # A tokenizer can name a BOS and not use it (GPT-2): what it does itself decides.
        starts = backend.encode("a").ids[:1]
        uses_bos = bos is not None and starts == [self._id(bos)]
        self.bos_id = starts[0] if uses_bos else None

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and the special tokens beside it.

        Args:
          folder: A Hugging Face folder.

        Returns:
          The tokenizer.

        Raises:
          ModelError: A file is missing or damaged, or no end token is named anywhere.
        """
        import tokenizers

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(_cannot_read(file, "no such file"))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(_cannot_read(file, str(error)[:200])) from error
        backend.no_truncation()
        backend.no_padding()
        settings = _read_json(folder / "special_tokens_map.json")
        settings |= _read_json(folder / "tokenizer_config.json")
        eos = _text_of(settings.get("eos_token")) or _eos_of_model(folder, backend)
        if eos is None or backend.token_to_id(eos) is None:
            raise ModelError(
                format_error(
                    str(folder / "tokenizer_config.json"),
                    got=f"eos_token {eos!r}",
                    expected="an end token that tokenizer.json has: answers could never end",
                    fix='Add "eos_token" to tokenizer_config.json.',
                )
            )
        return cls(backend, folder, eos=eos, bos=_text_of(settings.get("bos_token")))

    @property
    def size(self) -> int:
        """Count the tokens, added ones too."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, with one BOS in front where the tokenizer uses one.

        Args:
          text: Any text; a chat template may have put the BOS into it already.

        Returns:
          The ids.

        Raises:
          DataError: The text begins with two BOS.
        """
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Encode, and say for each id where its piece of the text ends, in characters.

        Args:
          text: Any text.

        Returns:
          The ids, and as many positions in the text.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, ends = list(encoding.ids), [end for _, end in encoding.offsets]
        if self.bos_id is None:
            return ids, ends
        if ids[:2] == [self.bos_id, self.bos_id]:
            raise DataError(
                format_error(
                    f"the text {text[:60]!r}",
                    got="two start tokens in front",
                    expected="exactly one",
                    fix="Take the start token out of the text or out of the chat template.",
                )
            )
        if ids[:1] == [self.bos_id]:
            return ids, ends
        return [self.bos_id, *ids], [0, *ends]

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decode_all(self, ids: list[int]) -> str:
        """Turn ids into text, special tokens and all."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def ids_containing(self, text: str) -> list[int]:
        """Find the tokens whose own text holds a text: all that can end a line, say."""
        return [index for index in range(self.size) if text in self._backend.decode([index])]

    def render(
        self, messages: list[dict[str, Any]], *, answer_next: bool = False, tools: Any = None
    ) -> str:
        """Write a conversation out by the tokenizer's chat template.

        Args:
          messages: Turns with `role` and `content`.
          answer_next: End with what begins an answer.
          tools: Descriptions of the tools that the model may call.

        Returns:
          The text that the model sees.

        Raises:
          ModelError: The tokenizer has no chat template.
          DataError: The template refuses the conversation.
        """
        if self._template is None:
            self._template = ChatTemplate(self._folder)
        return self._template.render(messages, answer_next=answer_next, tools=tools)

    def is_special(self, index: int) -> bool:
        """Tell a token that stands for no text, such as the end of a turn."""
        return index in self._special

    @functools.cached_property
    def _special(self) -> set[int]:
        added = self._backend.get_added_tokens_decoder()
        return {index for index, token in added.items() if token.special}

    def _id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        return -1 if index is None else index


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
