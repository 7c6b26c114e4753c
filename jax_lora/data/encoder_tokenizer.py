"""A tokenizer for models with an encoder: texts and pairs of texts, with their special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_lora.data.added_tokens import special_tokens_of
from jax_lora.data.base_tokenizer import BaseTokenizer
from jax_lora.data.tokenizer_backend import library_errors
from jax_lora.errors import ModelError


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


class EncoderTokenizer(BaseTokenizer):
    """Text to ids and back, for BERT, RoBERTa, and T5.

    Args:
      folder: A Hugging Face folder.

    Raises:
      ModelError: A file is missing or damaged.
    """

    def __init__(self, folder: Path):
        """Look up the mask token."""
        super().__init__(folder)
        special = special_tokens_of(folder, self._backend.get_vocab())
        self.mask_text = mask = special.get("mask_token")
        self.mask_id = None if mask is None else self._backend.token_to_id(mask)

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
            self._check_embedded(encoding.ids)
            return EncodedText(
                np.asarray(encoding.ids, np.int32),
                np.asarray(encoding.type_ids, np.int32),
                np.asarray(encoding.special_tokens_mask, bool),
                cut,
            )

    def require_mask(self) -> None:
        """Check that there is a mask token, with an embedding in the model.

        Raises:
          ModelError: The tokenizer has no mask token, or the model has no embedding for it.
        """
        if self.mask_id is None:
            raise ModelError(
                str(self._folder),
                got="a tokenizer without a mask token",
                expected="a mask token, as masked language models need",
                fix='Add "mask_token" to tokenizer_config.json.',
            )
        self._check_special("mask", self.mask_id)
