"""Batched text generation with padding to a few lengths and stop strings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError
from jax_lora.models.decoding import Progress, advance, begin, end_mask, make_choice

# Prompts are padded to a multiple of this, which limits both recompilation and padding.
PROMPT_MULTIPLE = 64
# Number of tokens between two searches for stop strings.
SEGMENT = 16


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates text with a decoder.

    Merge an adapter into `variables` for the fastest decoding. Variables from `combine` work too.

    Args:
      model: A decoder of `jax_lora.models`.
      variables: `{"params": params}`.
      tokenizer: The model's tokenizer.
      max_tokens: Maximum number of new tokens.
      rows: Batch size; smaller batches are padded to it, to avoid recompilation.
      stop: Stop strings; a completion ends before the first of them.
      temperature: Divides the logits; 0 selects greedy decoding.
      top_k: Sample from the k most likely tokens.
      top_p: Sample from the smallest set of tokens with at least this total probability.
      seed: Random seed of sampling; each prompt of a list has a different key.
      pad_to_powers_of_two: Pad prompts to a power of two, at least 64, to limit recompilation in
        growing conversations.

    Raises:
      ConfigError: A value is out of range, or a stop string is empty.
    """

    model: Any
    variables: Any
    tokenizer: Tokenizer
    max_tokens: int = 256
    rows: int = 1
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    pad_to_powers_of_two: bool = False

    def __post_init__(self):
        """Check the sampling settings and the stop strings."""
        self._choice([0])
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(
                "stop",
                got=f"{self.stop!r}",
                expected="a tuple of non-empty strings",
                fix='Use, for example, stop=("\\n",). Completions always end at the end token.',
            )

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Complete prompts of token ids, in their order, without end token and stop string.

        Raises:
          ConfigError: A prompt is empty, or too long for the model with `max_tokens` new tokens.
        """
        for prompt in prompts:
            self._check(prompt)
        answers = [""] * len(prompts)
        for chosen, filled in filled_batches(list(map(len, prompts)), self.rows):
            texts = self._batch([prompts[index] for index in filled], filled)
            for index, text in zip(chosen, texts, strict=False):
                answers[index] = text
        return answers

    def _check(self, prompt: Sequence[int]) -> None:
        most = self._most
        if not prompt or len(prompt) + self.max_tokens > most:
            raise ConfigError(
                "the prompt",
                got=f"{len(prompt)} tokens, plus up to {self.max_tokens} for the completion",
                expected=f"at least one token, and at most {most} in total",
                fix="Shorten the prompt, or lower max_tokens.",
            )

    def grow(self, prompt: Sequence[int]) -> Iterator[list[int]]:
        """Complete one prompt of token ids token by token.

        Yields:
          All tokens of the completion so far, with the end token.

        Raises:
          ConfigError: See `answer`.
        """
        self._check(prompt)
        progress, advanced = self._begun([prompt], [0], self._ends)
        for until in range(1, self.max_tokens + 1):
            progress = advanced(progress, until)
            yield np.asarray(progress.tokens)[0, : int(progress.lengths[0])].tolist()
            if bool(progress.done[0]):
                return

    def _begun(
        self, prompts: Sequence[Sequence[int]], places: Sequence[int], halts: np.ndarray
    ) -> tuple[Progress, Callable[[Progress, int], Progress]]:
        """Return the state before the first token, and what decodes up to a number of tokens."""
        ids, mask = self._padded(prompts)
        choice, padding = self._choice(places), np.int32(self.tokenizer.eos_id)
        model, variables = self.model, self.variables

        def advanced(progress: Progress, until: int) -> Progress:
            end = np.int32(until)
            return advance(model, variables, ids, mask, progress, end, halts, padding, choice)

        return begin(model, variables, ids.shape, self.max_tokens), advanced

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Pad prompts on the left to one of a few lengths: (rows, length) ids and mask."""
        length = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        if self.pad_to_powers_of_two:
            doubled = PROMPT_MULTIPLE << (length // PROMPT_MULTIPLE - 1).bit_length()
            length = max(length, min(doubled, self._most - self.max_tokens))
        ids = np.zeros((len(prompts), length), np.int32)
        mask = np.zeros((len(prompts), length), np.int32)
        for row, prompt in enumerate(prompts):
            # Padding on the left lets all completions start in the same column.
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        return ids, mask

    @property
    def _most(self) -> int:
        return self.model.config.max_position_embeddings

    def _batch(self, prompts: list[Sequence[int]], places: list[int]) -> list[str]:
        progress, advanced = self._begun(prompts, places, self._ends | self._stops)
        most, texts = self.max_tokens, []
        step = SEGMENT if self.stop else most
        for until in range(step, most + step, step):  # where stop strings are searched for
            progress = advanced(progress, min(until, most))
            texts, stopped = self._texts(progress)
            # Decoding of a row ends at a stop string.
            done = np.asarray(progress.done) | stopped
            if done.all():
                break
            progress = progress._replace(done=jnp.asarray(done))
        return texts

    def _texts(self, progress: Progress) -> tuple[list[str], np.ndarray]:
        """Return the texts of the rows, and which of them have reached a stop string."""
        rows = zip(np.array(progress.tokens).tolist(), progress.lengths.tolist(), strict=True)
        cut = [self.text_of(tokens[:length]) for tokens, length in rows]
        return [text for text, _ in cut], np.array([stopped for _, stopped in cut])

    def text_of(self, tokens: list[int]) -> tuple[str, bool]:
        """Decode a completion up to the first stop string, and tell whether there was one."""
        if tokens and self._ends[tokens[-1]]:
            tokens = tokens[:-1]
        text = self.tokenizer.decode(tokens)
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _choice(self, places: Sequence[int]) -> Any:
        """Return the sampling keys of the prompts at these indices."""
        keys = None
        if self.temperature:
            numbers = np.array(places, np.uint32)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), numbers)
        top_k, top_p = self.top_k, self.top_p
        return make_choice(
            keys, len(places), temperature=self.temperature, top_k=top_k, top_p=top_p
        )

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Return a mask of the end tokens: (vocabulary,) booleans."""
        ends = self.model.config.eos_token_id
        ends = ends if isinstance(ends, tuple) else () if ends is None else (ends,)
        return end_mask(self.model, (self.tokenizer.eos_id, *ends))

    @functools.cached_property
    def _stops(self) -> np.ndarray:
        """Return a mask of the tokens that contain a stop string: (vocabulary,) booleans."""
        found = {index for stop in self.stop for index in self.tokenizer.ids_containing(stop)}
        return end_mask(self.model, found)


def filled_batches(lengths: Sequence[int], rows: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the indices of each batch, without and with the repetitions that fill the last one.

    A batch is padded to its longest sequence, so sequences of similar length are together.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for start in range(0, len(order), max(rows, 1)):
        chosen = order[start : start + rows]
        yield chosen, chosen + chosen[-1:] * (rows - len(chosen))
