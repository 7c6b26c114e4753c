"""A tokenizer for models with an encoder: texts and pairs of texts, with their special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jax_lora.data.added_tokens import special_tokens_of
from jax_lora.data.tokenizer_backend import (
    check_embedded,
    check_special,
    embedded_tokens,
    library_errors,
    read_backend,
)
from jax_lora.errors import ModelError, format_error
from jax_lora.storage.safe_paths import given_path

if TYPE_CHECKING:
    import tokenizers


class EncodedText(NamedTuple):
    """A text, or a pair of texts, as an encoder reads it.

    Attributes:
      ids: (tokens,) int32, with the special tokens that the tokenizer adds.
      types: (tokens,) int32, 0 in the first text and 1 in the second.
      special: (tokens,) booleans, True at special tokens.
      cut: Whether the text was longer than allowed.
    """

    ids: np.ndarray
    types: np.ndarray
    special: np.ndarray
    cut: bool


class EncoderTokenizer:
    """Text to ids and back, for BERT, RoBERTa, and T5.

    Args:
      backend: What `tokenizers.Tokenizer.from_file` returns.
      folder: The tokenizer's folder, for messages.
      mask: The mask token's text, or None.
      embedded: How many tokens have an embedding in the model; None: all.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: Path,
        *,
        mask: str | None,
        embedded: int | None = None,
    ):
        """Look up the mask token."""
        self._backend, self._folder, self._embedded = backend, folder, embedded
        self.mask_text = mask
        self.mask_id = None if mask is None else backend.token_to_id(mask)

    @classmethod
    def load(cls, folder: str | Path) -> EncoderTokenizer:
        """Load `tokenizer.json` and the special tokens of a folder.

        Args:
          folder: A Hugging Face folder.

        Returns:
          The tokenizer.

        Raises:
          ModelError: A file is missing or damaged.
        """
        folder = given_path(folder, ModelError)
        backend = read_backend(folder)
        mask = special_tokens_of(folder, backend.get_vocab()).get("mask_token")
        return cls(backend, folder, mask=mask, embedded=embedded_tokens(folder))

    @property
    def size(self) -> int:
        """Count the tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, pair: str | None = None, *, max_length: int) -> EncodedText:
        """Turn a text, or a pair of texts, into ids.

        Args:
          text: The text.
          pair: The second text.
          max_length: The most tokens, special ones included; of a pair the longer text is cut.

        Returns:
          The ids, and what each of them is.

        Raises:
          DataError: A token has no embedding in the model.
        """
        backend = self._backend
        with library_errors(self._folder):
            backend.no_truncation()
            encoding = backend.encode(text, pair)
            cut = len(encoding.ids) > max_length
            if cut:
                backend.enable_truncation(max_length, strategy="longest_first")
                encoding = backend.encode(text, pair)
            check_embedded(encoding.ids, self._embedded, backend)
            return EncodedText(
                np.asarray(encoding.ids, np.int32),
                np.asarray(encoding.type_ids, np.int32),
                np.asarray(encoding.special_tokens_mask, bool),
                cut,
            )

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, without special tokens."""
        with library_errors(self._folder):
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def require_mask(self, folder: Path | str) -> int:
        """Return the mask token's id.

        Args:
          folder: Where the tokenizer came from, for the message.

        Returns:
          The id.

        Raises:
          ModelError: The tokenizer has no mask token, or the model has no embedding for it.
        """
        if self.mask_id is None:
            raise ModelError(
                format_error(
                    str(folder),
                    got="a tokenizer without a mask token",
                    expected="a mask token, as masked language models need",
                    fix='Add "mask_token" to tokenizer_config.json.',
                )
            )
        check_special(self._folder, "mask", self.mask_id, self._embedded, self._backend)
        return self.mask_id
