"""Generate sample completions at every validation."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.generation import Generator

MOST_TOKENS = 64
SHARE = 2  # completions use at most 1/SHARE of a model's positions


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Completes the same prompts at every validation, with greedy decoding.

    Args:
      model: A decoder of `jax_lora.models`.
      tokenizer: The model's tokenizer.
      prompts: The prompts.
    """

    model: Any
    tokenizer: Tokenizer
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse prompts that are too long, before training starts."""
        room = self._most - self._max_tokens
        for prompt in self.prompts:
            size = len(self._encode(prompt))
            if size > room or size == 0:
                raise ConfigError(
                    format_error(
                        f"the sample prompt {prompt[:60]!r}",
                        got=f"{size} tokens",
                        expected=f"from 1 to {room}: the model has {self._most} positions, of "
                        f"which {self._max_tokens} are for the completion",
                        fix="Shorten the prompt.",
                    )
                )

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.format_prompt(prompt))

    @property
    def _most(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def _max_tokens(self) -> int:
        return min(MOST_TOKENS, self._most // SHARE)

    def answers(self, variables: Any) -> tuple[tuple[str, str], ...]:
        """Complete the prompts.

        Args:
          variables: The model's variables, with or without an adapter.

        Returns:
          Pairs of prompt and completion.
        """
        if not self.prompts:
            return ()
        generator = Generator(
            self.model,
            variables,
            self.tokenizer,
            max_tokens=self._max_tokens,
            rows=len(self.prompts),
        )
        ids = [self._encode(prompt) for prompt in self.prompts]
        return tuple(zip(self.prompts, generator.answer(ids), strict=True))
