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
        """Refuse prompts that leave no room, before a run has gone on for hours."""
        room = self._most - self._answer
        for prompt in self.prompts:
            size = len(self.tokenizer.encode(prompt))
            if size > room or size == 0:
                raise ConfigError(
                    format_error(
                        f"the sample prompt {prompt[:60]!r}",
                        got=f"{size} tokens",
                        expected=f"from 1 to {room}: the model has {self._most} positions, of "
                        f"which {self._answer} are for the answer",
                        fix="Shorten the prompt.",
                    )
                )

    @property
    def _most(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def _answer(self) -> int:
        return min(MOST_TOKENS, self._most // SHARE)

    def answers(self, variables: Any) -> tuple[tuple[str, str], ...]:
        """Answer.

        Args:
          variables: The model's variables, with or without an adapter.

        Returns:
          Every prompt with its answer.
        """
        if not self.prompts:
            return ()
        generator = Generator(
            self.model, variables, self.tokenizer, max_tokens=self._answer, rows=len(self.prompts)
        )
        ids = [self.tokenizer.encode(prompt) for prompt in self.prompts]
        return tuple(zip(self.prompts, generator.answer(ids), strict=True))
