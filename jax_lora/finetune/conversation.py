"""A conversation in the format of the chat template, or as plain text without one."""

from __future__ import annotations

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ModelError


class Conversation:
    """The turns of a conversation.

    Args:
      tokenizer: The model's tokenizer.
      system: The system message; only with a chat template.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        """Start without turns, and check for a chat template."""
        self._tokenizer = tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []
        try:
            tokenizer.render([{"role": "user", "content": "?"}], answer_next=True)
        except ModelError:
            self.has_template = False
        else:
            self.has_template = True

    def reset(self) -> None:
        """Remove all turns."""
        self._turns.clear()

    def ask(self, text: str) -> None:
        """Add a user turn."""
        self._turns.append({"role": "user", "content": text})

    def respond(self, text: str) -> None:
        """Add an assistant turn."""
        self._turns.append({"role": "assistant", "content": text})

    def undo(self) -> None:
        """Remove the last turn."""
        self._turns.pop()

    def prompt(self, room: int) -> tuple[list[int], int]:
        """Return the prompt for the next response, and remove the oldest turns if it is too long.

        Returns:
          The ids, and the number of removed turns. The last turn is never removed, so there can be
          more than `room` ids.
        """
        removed = 0
        while len(ids := self._ids()) > room and len(self._turns) > 1:
            pair = 2 if len(self._turns) > 2 else 1  # a user turn and its response
            del self._turns[:pair]
            removed += pair
        return ids, removed

    def _ids(self) -> list[int]:
        if self.has_template:
            text = self._tokenizer.render([*self._system, *self._turns], answer_next=True)
        else:
            text = "".join(turn["content"] for turn in self._turns)
        return self._tokenizer.encode(text)
