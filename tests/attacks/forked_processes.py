"""Start processes that are killed: each is forked from one that has imported everything.

Imports take seconds, a fork milliseconds. The process that forks has one thread and starts no
backend of JAX, so that each child starts its own.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.xla_flags import for_devices

ROOT = Path(__file__).parents[2]
PRELOADED = ["tests.attacks.saving_process", "tests.attacks.training_command"]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OPENBLAS_NUM_THREADS": "1",  # threads do not survive a fork
    "XLA_FLAGS": for_devices(1),
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a child compiles nothing again
}


class Forked:
    """A child process, and the lines that it reports.

    Args:
      target: A function of a module in `PRELOADED`; its first argument is a function that reports
        a line.
      *args: Its other arguments.
    """

    def __init__(self, target: Callable[..., None], *args: Any):
        self._lines, sender = _context().Pipe(duplex=False)
        self._process = _context().Process(target=_run, args=(sender, target, *args))
        self._process.start()
        sender.close()

    def line(self, timeout: float = 300) -> str | None:
        """Return the next line; None when the process has ended."""
        if not self._lines.poll(timeout):
            raise TimeoutError(f"nothing reported in {timeout} s")
        try:
            return self._lines.recv_bytes().decode()
        except (EOFError, OSError):  # killed in the middle of a line
            return None

    def kill(self) -> list[str]:
        """Kill the process; return the lines that were not read yet."""
        self._process.kill()
        lines = list(iter(self.line, None))
        self.join()
        assert self._process.exitcode in (0, -signal.SIGKILL), self._process.exitcode
        return lines

    def join(self) -> None:
        """Wait for the end of the process."""
        self._process.join()
        self._lines.close()


def _run(sender: Any, target: Callable[..., None], *args: Any) -> None:
    target(lambda line: sender.send_bytes(line.encode()), *args)


def _context() -> Any:
    return multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Start the process that forks, and return `Forked`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        # A folder for these processes alone: a kill may leave an unfinished entry.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
        _context().set_forkserver_preload(PRELOADED)
        Forked(_nothing).join()
    return Forked


def _nothing(report: Callable[[str], None]) -> None:
    pass


def state_of_parent(report: Callable[[str], None]) -> None:
    """Report the threads of the process that forks; a backend of JAX would have several."""
    report(str(len(os.listdir(f"/proc/{os.getppid()}/task"))))
