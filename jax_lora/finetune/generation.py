"""Greedy generation for many prompts at once, with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.errors import ConfigError, explain
from jax_lora.finetune.tokenizer import Tokenizer

# Prompts are padded to a multiple of this: few programs, and not much padding.
PROMPT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model ready to answer; merge an adapter into `variables` first.

    Merged weights are the quickest way to run one adapter: no more work than the base itself.

    Args:
      model: A decoder of `jax_lora.models`.
      variables: `{"params": params}`.
      tokenizer: The model's tokenizer.
      max_tokens: Most tokens of an answer.
      rows: Prompts that are answered together; fewer are filled up, so that one program serves.
      stop_at_newline: End an answer at its first line.
    """

    model: Any
    variables: Any
    tokenizer: Tokenizer
    max_tokens: int = 256
    rows: int = 1
    stop_at_newline: bool = False

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Answer prompts, the most likely token at a time.

        Args:
          prompts: Ids of each prompt, of any lengths.

        Returns:
          The answers' texts, in the prompts' order, without the end token.

        Raises:
          ConfigError: A prompt is empty, or leaves the model's positions no room for an answer.
        """
        for prompt in prompts:
            self._check(prompt)
        # Equal lengths together: a batch is padded to the longest prompt in it.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), self.rows):
            chosen = order[start : start + self.rows]
            for index, text in zip(chosen, self._batch([prompts[i] for i in chosen]), strict=False):
                answers[index] = text
        return answers

    def _check(self, prompt: Sequence[int]) -> None:
        most = self.model.config.max_position_embeddings
        if not prompt or len(prompt) + self.max_tokens > most:
            raise ConfigError(
                explain(
                    "the prompt",
                    got=f"{len(prompt)} tokens, and up to {self.max_tokens} for the answer",
                    expected=f"at least one token, and no more than the model's {most} together",
                    fix="Shorten the prompt, or lower --max-tokens.",
                )
            )

    def _batch(self, prompts: list[Sequence[int]]) -> list[str]:
        length = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        ids = np.zeros((self.rows, length), np.int32)
        mask = np.zeros((self.rows, length), np.int32)
        for row in range(self.rows):
            prompt = prompts[min(row, len(prompts) - 1)]
            # On the left, so that every answer begins in the same column.
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        out, counts = _greedy(
            self.model, self.max_tokens, self.variables, ids, mask, self._stop_mask
        )
        rows = zip(np.asarray(out).tolist(), np.asarray(counts).tolist(), strict=True)
        return [self._text(tokens[:count]) for tokens, count in rows]

    def _text(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens)
        return text.split("\n")[0] if self.stop_at_newline else text

    @functools.cached_property
    def _stop_mask(self) -> np.ndarray:
        """(vocabulary,) booleans: the tokens after which an answer is over."""
        stops = np.zeros(self.model.config.vocab_size, bool)
        ends = self.model.config.eos_token_id
        ends = ends if isinstance(ends, tuple) else () if ends is None else (ends,)
        newlines = self.tokenizer.ids_containing("\n") if self.stop_at_newline else ()
        stops[[self.tokenizer.eos_id, *ends, *newlines]] = True
        return stops


@functools.partial(jax.jit, static_argnums=(0, 1))
def _greedy(
    model: Any, most: int, variables: Any, ids: jax.Array, mask: jax.Array, stops: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the tokens, (rows, most), and how many of each row count."""
    rows, length = ids.shape
    dtype = jax.tree.leaves(variables)[0].dtype
    mask = jnp.concatenate([mask, jnp.ones((rows, most), mask.dtype)], axis=1)

    def next_token(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        hidden, cache = model.apply(
            variables, tokens, attention_mask=mask, cache=cache, return_hidden=True
        )
        logits = model.apply(variables, hidden[:, -1], method="unembed")  # (rows, vocabulary)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def running(state: Any) -> jax.Array:
        count, _, done, _, _, _ = state
        return (count < most) & ~done.all()

    def write(state: Any) -> Any:
        count, token, done, lengths, out, cache = state
        out = jax.lax.dynamic_update_slice(out, token[:, None], (jnp.int32(0), count))
        done = done | stops[token]
        lengths = lengths + (~done).astype(jnp.int32)
        token, cache = next_token(token[:, None], cache)
        return count + 1, token, done, lengths, out, cache

    token, cache = next_token(ids, model.init_cache(rows, length + most, dtype))
    zeros = jnp.zeros((rows,), jnp.int32)
    state = (jnp.int32(0), token, zeros > 0, zeros, jnp.zeros((rows, most), jnp.int32), cache)
    _, _, _, lengths, out, _ = jax.lax.while_loop(running, write, state)
    return out, lengths
