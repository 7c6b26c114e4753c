"""Ctrl-C and SIGTERM as a wish to stop: the step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Within its `with` block, signals set `requested` instead of ending the program.

    A second Ctrl-C ends it at once: whoever presses it twice means it. Nothing is lost but the
    steps since the last checkpoint, as checkpoints are moved into place whole.

    Example:
      >>> with Interrupts() as interrupts:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     interrupts.requested
      'SIGTERM'
    """

    def __init__(self) -> None:
        """Begin with nothing requested."""
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        """Take over the signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
