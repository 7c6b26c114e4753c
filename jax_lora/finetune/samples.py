"""Answers to a few prompts at every validation: a loss says less than a text does."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.finetune.generation import Generator

MOST_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Answers the same prompts again and again, the likeliest token every time.

    Args:
      model: A decoder of `jax_lora.models`.
      tokenizer: The model's tokenizer.
      prompts: What is asked.
    """

    model: Any
    tokenizer: Tokenizer
    prompts: tuple[str, ...]

    def answers(self, variables: Any) -> tuple[tuple[str, str], ...]:
        """Answer.

        Args:
          variables: The model's variables, an adapter beside them or none.

        Returns:
          Every prompt with its answer.
        """
        if not self.prompts:
            return ()
        generator = Generator(
            self.model, variables, self.tokenizer, max_tokens=MOST_TOKENS, rows=len(self.prompts)
        )
        ids = [self.tokenizer.encode(prompt) for prompt in self.prompts]
        return tuple(zip(self.prompts, generator.answer(ids), strict=True))
