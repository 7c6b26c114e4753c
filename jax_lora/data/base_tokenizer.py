"""The base class of tokenizers for decoders and encoders: decoding, and checks of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from jax_lora.data.special_tokens import read_settings
from jax_lora.data.tokenizer_backend import library_errors, read_backend
from jax_lora.errors import DataError, ModelError
from jax_lora.storage import schema
from jax_lora.storage.safe_paths import given_path

_VOCAB_SIZE = {"vocab_size": schema.optional(schema.integer(1, 2**31 - 1))}
# The text part of a multimodal model has a configuration of its own.
_MODEL_SIZE = schema.fields(
    _VOCAB_SIZE | {"text_config": schema.optional(schema.fields(_VOCAB_SIZE))}
)


class BaseTokenizer:
    """The tokenizer of a Hugging Face folder.

    Some tokenizers name tokens that their model does not have, such as Gemma 3's image token.

    Args:
      folder: The folder.

    Raises:
      ModelError: A file is missing or damaged.
    """

    def __init__(self, folder: Path):
        """Read the tokenizer, and the number of embeddings in `config.json`, if it is there."""
        self._folder, self._backend = folder, read_backend(folder)
        settings = read_settings(folder / "config.json", _MODEL_SIZE)
        of_text = settings.get("text_config") or {}
        self._embedded = settings.get("vocab_size") or of_text.get("vocab_size")

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """Load the tokenizer of a folder.

        Args:
          folder: A Hugging Face folder.
          **options: The other arguments of the class.

        Returns:
          The tokenizer.

        Raises:
          ModelError: As the class does, or the file system refuses the path.
        """
        return cls(given_path(folder, ModelError), **options)

    @property
    def size(self) -> int:
        """Return the vocabulary size, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def decode(self, ids: list[int]) -> str:
        """Decode ids, without special tokens."""
        with library_errors(self._folder):
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def _check_embedded(self, ids: list[int]) -> None:
        """Raise `DataError` if a token of a text has no embedding in the model."""
        if self._embedded is not None and ids and max(ids) >= self._embedded:
            raise DataError(
                "the tokens",
                got=self._shown(max(ids)),
                expected=f"tokens with an embedding, from 0 to {self._embedded - 1}",
                fix="Remove this token from the text: the model has no embedding for it.",
            )

    def _check_special(self, role: str, index: int | None) -> None:
        """Raise `ModelError` if a token that is added to every example has no embedding."""
        if self._embedded is not None and index is not None and index >= self._embedded:
            raise ModelError(
                f"{self._folder}: {role}_token",
                got=self._shown(index),
                expected="a token with an embedding in the model, from 0 to "
                f"{self._embedded - 1}: it is added to every example",
                fix=f'Name another token as "{role}_token" in tokenizer_config.json, or extend '
                "the embedding table of the model.",
            )

    def _shown(self, index: int) -> str:
        return f"{self._backend.id_to_token(index)!r}, token {index}"
