"""The ledger of a run: all that it remembers beside arrays, and writes down to be resumed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from jax_lora.errors import CheckpointError, format_error
from jax_lora.finetune.memory import peak_memory
from jax_lora.report.events import TrainReport


class Tokens(NamedTuple):
    """How many tokens a step has: of the rows' own text, with template and ends, with padding."""

    raw: int
    real: int
    padded: int


@dataclasses.dataclass
class Window:
    """Sums over the steps since the last report.

    Args:
      loss: Sum of the losses of the learned tokens.
      learned: How many those were.
      tokens: Real tokens, learned or not.
      seconds: Time of the steps alone.
      steps: How many steps.
    """

    loss: float = 0.0
    learned: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0


@dataclasses.dataclass
class Ledger:
    """What a run has done so far.

    Args:
      step: Updates made.
      raw: Tokens of all steps' own text.
      tokens: The same with template, start and end tokens.
      padded: Tokens of all steps with padding.
      learned: Learned tokens of all steps.
      seconds: Time of the run, without pauses between its parts.
      val_loss: The last validation loss.
      best_loss: The lowest one.
      best_step: The step that had it.
      unimproved: Validations since then.
      window: The steps since the last report.
    """

    step: int = 0
    raw: int = 0
    tokens: int = 0
    padded: int = 0
    learned: float = 0.0
    seconds: float = 0.0
    val_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    unimproved: int = 0
    window: Window = dataclasses.field(default_factory=Window)

    def add_step(self, loss: float, learned: float, tokens: Tokens, seconds: float) -> None:
        """Enter one step."""
        self.step += 1
        self.raw += tokens.raw
        self.tokens += tokens.real
        self.padded += tokens.padded
        self.learned += learned
        window = self.window
        window.loss += loss * learned
        window.learned += learned
        window.tokens += tokens.real
        window.seconds += seconds
        window.steps += 1

    def close_window(self, learning_rate: float) -> TrainReport:
        """Sum up the steps since the last report, and begin anew."""
        window, self.window = self.window, Window()
        seconds = max(window.seconds, 1e-9)
        return TrainReport(
            step=self.step,
            loss=window.loss / max(window.learned, 1.0),
            learning_rate=learning_rate,
            steps_per_second=window.steps / seconds,
            tokens_per_second=window.tokens / seconds,
            tokens=self.tokens,
            peak_memory=peak_memory(),
        )

    def add_validation(self, loss: float) -> bool:
        """Enter a validation, and tell whether it is the best one yet; no number never is."""
        self.val_loss = loss if math.isfinite(loss) else None
        if self.best_loss is not None and not loss < self.best_loss:
            self.unimproved += 1
            return False
        self.best_loss, self.best_step, self.unimproved = loss, self.step, 0
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; floats come back from JSON to the bit."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Ledger:
        """Read `to_dict`'s values.

        Args:
          values: Whatever was in the file.
          where: The file, for messages.

        Returns:
          The ledger.

        Raises:
          CheckpointError: These are no values of a ledger.
        """
        try:
            fields: Any = {name: _checked(cls, name, value) for name, value in values.items()}
            inner = {name: _checked(Window, name, v) for name, v in fields["window"].items()}
            return cls(**(fields | {"window": Window(**inner)}))
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                format_error(
                    where,
                    got=f"counts that cannot be read: {error}",
                    expected="what jax-lora train wrote",
                    fix="Resume from another checkpoint.",
                )
            ) from error


def _checked(of: type, name: str, value: Any) -> Any:
    kinds = {each.name: str(each.type) for each in dataclasses.fields(of)}
    if name not in kinds:
        raise TypeError(f"{name!r} is unknown")
    right = isinstance(value, dict if kinds[name] == "Window" else (int, float))
    if isinstance(value, bool) or not (right or (value is None and "None" in kinds[name])):
        raise TypeError(f"{name} is {value!r}")
    return value
