"""Generate sample completions at every validation."""

from __future__ import annotations

from typing import Any

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError
from jax_lora.finetune.generation import Generator

MOST_TOKENS = 64
SHARE = 2  # completions use at most 1/SHARE of a model's positions


class Sampler:
    """Completes the same prompts at every validation, with greedy decoding.

    Args:
      model: A decoder of `jax_lora.models`.
      tokenizer: The model's tokenizer.
      prompts: The prompts.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, prompts: tuple[str, ...]) -> None:
        """Refuse prompts that are too long, before training starts."""
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._ids = [tokenizer.encode(tokenizer.format_prompt(prompt)) for prompt in prompts]
        most = model.config.max_position_embeddings
        self._max_tokens = min(MOST_TOKENS, most // SHARE)
        room = most - self._max_tokens
        for prompt, ids in zip(prompts, self._ids, strict=True):
            if not 1 <= len(ids) <= room:
                raise ConfigError(
                    f"the sample prompt {prompt[:60]!r}",
                    got=f"{len(ids)} tokens",
                    expected=f"from 1 to {room}: the model has {most} positions, of "
                    f"which {self._max_tokens} are for the completion",
                    fix="Shorten the prompt.",
                )

    def answers(self, variables: Any) -> tuple[tuple[str, str], ...]:
        """Complete the prompts, and return pairs of prompt and completion."""
        if not self._prompts:
            return ()
        rows, most = len(self._prompts), self._max_tokens
        generator = Generator(self._model, variables, self._tokenizer, max_tokens=most, rows=rows)
        return tuple(zip(self._prompts, generator.answer(self._ids), strict=True))
