"""Handle Ctrl-C and SIGTERM: finish the current step and save before stopping."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from jax_lora.finetune.process_group import ProcessGroup


class Interrupts:
    """Inside the `with` block, signals set `requested` instead of ending the process.

    With several processes, a signal in one of them is shared at every step, and sets `requested` in
    all of them after the same step. A second Ctrl-C ends the process immediately. Only the steps
    since the last checkpoint are lost, because checkpoints are written atomically.

    Args:
      processes: The processes of the run; None: this one.

    Example:
      >>> with Interrupts() as interrupts:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     interrupts.requested
      'SIGTERM'
    """

    def __init__(self, processes: ProcessGroup | None = None) -> None:
        """Start without a request."""
        self.requested: str | None = None
        self._noted = 0  # the number of a signal that this process has received
        self._processes = processes or ProcessGroup()
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

    def share(self) -> Any:
        """Start to tell the other processes of a signal, and return the question for `hear`."""
        return self._processes.start_max(self._noted)

    def hear(self, question: Any) -> None:
        """Wait for the answer of all processes to a question of `share`."""
        if number := int(question):
            self.requested = signal.Signals(number).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted:
            raise KeyboardInterrupt
        self._noted = number
        if self._processes.alone:
            self.requested = signal.Signals(number).name
