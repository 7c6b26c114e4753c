"""Handle Ctrl-C and SIGTERM: finish the current step and save before stopping."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Inside the `with` block, signals set `requested` instead of ending the process.

    A second Ctrl-C ends it immediately. Only the steps since the last checkpoint are lost, because
    checkpoints are written atomically.

    Example:
      >>> with Interrupts() as interrupts:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     interrupts.requested
      'SIGTERM'
    """

    def __init__(self) -> None:
        """Start without a request."""
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        """Install the signal handlers, which is only possible in the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
