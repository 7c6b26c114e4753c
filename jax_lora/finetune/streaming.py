"""Stream generated text, without the characters that a later token can still change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax_lora.finetune.generation import Generator

UNFINISHED = "\ufffd"  # decoded from an incomplete UTF-8 sequence


def stream(generator: Generator, prompt: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Complete a prompt piece by piece.

    An incomplete character and the beginning of a stop string are held back until later tokens
    decide how they continue.

    Yields:
      The next piece of the completion, which may be empty, and the number of tokens so far.
    """
    shown, count, text = "", 0, ""
    for tokens in generator.grow(prompt):
        text, stopped = generator.text_of(tokens)
        count = len(tokens)
        certain = text if stopped else _certain(text, generator.stop)
        piece = certain[len(shown) :] if certain.startswith(shown) else ""
        shown += piece
        yield piece, count
        if stopped:
            return
    if text.startswith(shown):
        yield text[len(shown) :], count


def _certain(text: str, stops: Sequence[str]) -> str:
    """Remove the end of the text that later tokens can still change."""
    text = text.rstrip(UNFINISHED)
    held = max((_overlap(text, stop) for stop in stops), default=0)
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text with which the stop string begins."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
