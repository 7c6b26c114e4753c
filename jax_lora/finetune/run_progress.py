"""The progress of a run: everything but arrays that a checkpoint stores to be resumed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax_lora.errors import CheckpointError
from jax_lora.finetune.batch_source import Tokens
from jax_lora.finetune.memory import peak_memory
from jax_lora.report.events import TrainReport


@dataclasses.dataclass
class Window:
    """Sums over the steps since the last report.

    Args:
      loss: Sum of the losses.
      weight: Sum of the batches' weights: target tokens or examples.
      tokens: Real tokens, targets or not.
      seconds: Time of the steps alone.
      steps: Number of steps.
    """

    loss: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0


@dataclasses.dataclass
class RunProgress:
    """Counts and losses of a run so far.

    Args:
      step: Updates made.
      raw: Tokens of the texts of all steps.
      tokens: The same with template, start, and end tokens.
      padded: The same with padding.
      weight: Sum of the batches' weights: target tokens or examples.
      seconds: Duration of the run, without pauses between its parts.
      val_loss: The last validation loss.
      best_loss: The lowest validation loss.
      best_step: Its step.
      unimproved: Validations since then.
      window: The steps since the last report.
    """

    step: int = 0
    raw: int = 0
    tokens: int = 0
    padded: int = 0
    weight: float = 0.0
    seconds: float = 0.0
    val_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    unimproved: int = 0
    window: Window = dataclasses.field(default_factory=Window)

    def add_step(self, loss: float, weight: float, tokens: Tokens, seconds: float) -> None:
        """Add one step."""
        self.step += 1
        self.raw += tokens.raw
        self.tokens += tokens.real
        self.padded += tokens.padded
        self.weight += weight
        window = self.window
        window.loss += loss * weight
        window.weight += weight
        window.tokens += tokens.real
        window.seconds += seconds
        window.steps += 1

    def close_window(
        self, learning_rate: float | None = None, *, unit: str = "Tokens"
    ) -> TrainReport:
        """Summarize the steps since the last report, and begin a new window."""
        window, self.window = self.window, Window()
        seconds = max(window.seconds, 1e-9)
        return TrainReport(
            step=self.step,
            loss=window.loss / (window.weight or 1.0),
            learning_rate=learning_rate,
            steps_per_second=window.steps / seconds,
            tokens_per_second=window.tokens / seconds,
            tokens=self.tokens,
            peak_memory=peak_memory(),
            unit=unit,
        )

    def add_validation(self, loss: float) -> bool:
        """Add a validation, and tell whether it is the best so far; NaN never is."""
        self.val_loss = loss if math.isfinite(loss) else None
        worse = self.best_loss is not None and not loss < self.best_loss
        if worse or not math.isfinite(loss):
            self.unimproved += 1
            return False
        self.best_loss, self.best_step, self.unimproved = loss, self.step, 0
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; floats survive JSON bitwise."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> RunProgress:
        """Read the values of `to_dict` from a file, which `where` names in messages.

        Raises:
          CheckpointError: The values are not those of a run's progress.
        """
        try:
            fields: Any = _checked(cls, values)
            inner = _checked(Window, fields["window"])
            return cls(**(fields | {"window": Window(**inner)}))
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                where,
                got=f"counts that cannot be read: {error}",
                expected="what jax-lora train wrote",
                fix="Resume from another checkpoint.",
            ) from error


def _checked(of: type, values: Any) -> dict[str, Any]:
    """Check the type of every value, and give fields of earlier versions their present names."""
    kinds = {each.name: str(each.type) for each in dataclasses.fields(of)}
    checked = {}
    for given, value in values.items():
        name = "weight" if given == "learned" else given
        if name not in kinds:
            raise TypeError(f"{name!r} is unknown")
        right = isinstance(value, dict if kinds[name] == "Window" else (int, float))
        if isinstance(value, bool) or not (right or (value is None and "None" in kinds[name])):
            raise TypeError(f"{name} is {value!r}")
        checked[name] = value
    return checked
