"""A bound on the time of code that a stranger wrote, such as a chat template."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block when its time is up.

    It rests on a signal, which the main thread alone can take, and which Windows does not have:
    elsewhere the block is not bounded.

    Args:
      seconds: How long the block may take.

    Yields:
      Nothing.

    Raises:
      TimeoutError: It took longer.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{seconds:g} seconds were not enough")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
