"""A conversation: its turns as the model was trained to see them, or plain text."""

from __future__ import annotations

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ModelError


class Conversation:
    """What was said so far.

    Args:
      tokenizer: The model's tokenizer.
      system: What the model is told before the first turn; only with a chat template.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        """Begin, and see whether there is a chat template."""
        self._tokenizer = tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []
        self.has_template = self._try_template()

    def reset(self) -> None:
        """Forget all turns."""
        self._turns.clear()

    def ask(self, text: str) -> None:
        """Add a turn of the user."""
        self._turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add a turn of the model."""
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the last turn."""
        self._turns.pop()

    def prompt(self, room: int) -> tuple[list[int], int]:
        """Write out what the model is to go on from.

        Args:
          room: Most tokens; the oldest turns are forgotten until the rest fits.

        Returns:
          The ids, and how many turns were forgotten for it. The ids may be too many all the same:
          the last turn is never forgotten.
        """
        forgotten = 0
        while len(ids := self._ids()) > room and len(self._turns) > 1:
            pair = 2 if len(self._turns) > 2 else 1  # a question goes with its answer
            del self._turns[:pair]
            forgotten += pair
        return ids, forgotten

    def _ids(self) -> list[int]:
        if self.has_template:
            text = self._tokenizer.render([*self._system, *self._turns], answer_next=True)
        else:
            text = "".join(turn["content"] for turn in self._turns)
        return self._tokenizer.encode(text)

    def _try_template(self) -> bool:
        try:
            self._tokenizer.render([{"role": "user", "content": "?"}], answer_next=True)
        except ModelError:
            return False
        return True
