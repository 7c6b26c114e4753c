"""Stream generated text, without the characters that a later token can still change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax_lora.finetune.generation import Generator

UNFINISHED = "\ufffd"  # decoded from an incomplete UTF-8 sequence


def stream(generator: Generator, prompt: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Answer one prompt piece by piece.

    Half a character is held back, and so is the beginning of a stop text, until it is whole or
    turns out to be something else.

    Args:
      generator: A model ready to answer, of one row.
      prompt: The prompt's ids.

    Yields:
      The next piece of the answer, which may be empty, and the number of tokens so far.
    """
    said, count, text = "", 0, ""
    for tokens in generator.grow(prompt):
        text, stopped = generator.text_of(tokens)
        count = len(tokens)
        certain = text if stopped else _certain(text, generator.stop)
        piece = certain[len(said) :] if certain.startswith(said) else ""
        said += piece
        yield piece, count
        if stopped:
            return
    if text.startswith(said):
        yield text[len(said) :], count


def _certain(text: str, stops: Sequence[str]) -> str:
    """Cut off what may still become another text."""
    text = text.rstrip(UNFINISHED)
    held = max((_overlap(text, stop) for stop in stops), default=0)
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of the text that a stop text begins with."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
