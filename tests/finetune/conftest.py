"""The tests of this folder share one small tokenizer and one small model."""

from tests.tiny_model import tiny, tokenizer, tokenizer_with_bos

__all__ = ["tiny", "tokenizer", "tokenizer_with_bos"]
