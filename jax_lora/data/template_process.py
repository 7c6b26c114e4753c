"""Render a chat template in a child process, with limits on its time, memory and output.

A template is untrusted code. The sandbox of jinja2 keeps it from files and from Python objects, but
not from `10 ** 10 ** 9`, which no signal handler or thread of the same process can stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import IO, Any, cast

from jax_lora.data import template_worker
from jax_lora.data.template_worker import HEAD, OUTPUT, decode, encode, framed

START_SECONDS = 60.0  # for a cold disk; it takes 0.1 seconds otherwise
EXPANSION = 6  # bytes of JSON for a byte of text, at most


class RenderError(Exception):
    """The process cannot render."""


class LimitError(RenderError):
    """The process exceeded a limit.

    Args:
      name: The limit's name in `jax_lora.storage.limits`.
    """

    def __init__(self, name: str):
        """Keep the name."""
        super().__init__(f"it exceeded {name}")
        self.name = name


@dataclasses.dataclass(frozen=True)
class TemplateLimits:
    """Limits of one request.

    Args:
      seconds: Elapsed time, and processor time.
      memory: Bytes of the child process's address space.
      output: Bytes of the rendered text in UTF-8.
    """

    seconds: float
    memory: int
    output: int


class TemplateProcess:
    """A child process that renders one template, started on first use and after it ended.

    Threads may share it, and it starts again in a forked process.

    Args:
      template: The template's text.
      tokens: Texts of the special tokens by the names that templates use, such as `bos_token`.
      limits: Limits of each request.
    """

    def __init__(self, template: str, tokens: dict[str, Any], limits: TemplateLimits):
        """Start nothing yet."""
        self._template, self._tokens, self._limits = template, tokens, limits
        self._forget()
        _ALL.add(self)

    def render(self, requests: list[str]) -> list[dict[str, str]]:
        """Render conversations.

        Args:
          requests: For each, the JSON object of the template's variables, with `messages`.

        Returns:
          `{"text": ...}`, `{"error": ...}` or `{"limit": NAME}` for each, or for the first ones if
          the texts together come near a limit.

        Raises:
          LimitError: The process exceeded a limit, and was ended.
          RenderError: The process ended.
        """
        message = framed(f"[{','.join(requests)}]")
        with self._lock:
            child = self._running()
            try:
                return child.ask(message, self._limits.seconds)
            except BaseException:  # an interrupt too: its answer would be taken for the next one
                self._stop()
                raise

    def __reduce__(self) -> Any:
        """Copy the settings; every copy starts a separate process."""
        return TemplateProcess, (self._template, self._tokens, self._limits)

    def _running(self) -> _Child:
        if self._child is None or self._child.process.poll() is not None:
            self._stop()
            child = self._child = _Child(self._limits)
            self._end = weakref.finalize(self, child.stop)
            settings = dataclasses.asdict(self._limits) | {
                "template": self._template,
                "tokens": self._tokens,
                "path": [entry for entry in sys.path if os.path.isabs(entry)],
            }
            ready = child.ask(encode(settings), START_SECONDS)
            if "error" in ready:
                self._stop()
                raise RenderError(ready["error"])
        return self._child

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._child = self._end = None

    def leave_to_parent(self) -> None:
        """Start anew in a forked process: its parent goes on with the child and the lock."""
        self._stop()
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._end: weakref.finalize[..., Any] | None = None


class _Child:
    """The process and its pipes."""

    def __init__(self, limits: TemplateLimits):
        self._most = EXPANSION * limits.output + 2**16
        self._owner = os.getpid()
        # -I and -S: no variable of the environment and no file of the folder changes the process.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(template_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._requests = cast(IO[bytes], self.process.stdin)
        self._answers = cast(IO[bytes], self.process.stdout)

    def ask(self, message: bytes, seconds: float) -> Any:
        """Send a message and wait for the answer."""
        until = time.monotonic() + seconds
        # Where pipes cannot be polled (Windows), the end of the process ends the wait.
        timer = None if hasattr(select, "poll") else threading.Timer(seconds, self.process.kill)
        if timer is not None:
            timer.start()
        try:
            self._write(message)
            (size,) = HEAD.unpack(self._read(HEAD.size, until))
            if size > self._most:
                raise LimitError(OUTPUT)
            return decode(self._read(size, until))
        except (EOFError, OSError) as error:
            if time.monotonic() >= until:
                raise LimitError("template_seconds") from error
            code = self._exit_code()
            if code == -getattr(signal, "SIGXCPU", 0):
                raise LimitError("template_seconds") from error
            raise RenderError(f"the process that renders it ended (exit code {code})") from error
        finally:
            if timer is not None:
                timer.cancel()

    def _exit_code(self) -> int | None:
        """Return the exit code of a process that closed its pipes, so is about to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        return self.process.returncode

    def stop(self) -> None:
        """End the process, and close the pipes. A fork of its parent only closes them."""
        if os.getpid() != self._owner:
            self.process.returncode = 0  # the parent waits for it
        else:
            self.process.kill()
            self.process.wait()
        self._requests.close()
        self._answers.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._requests.fileno(), left) :]

    def _read(self, count: int, until: float) -> bytes:
        file = self._answers.fileno()
        data = bytearray()
        while len(data) < count:
            _await(file, until)
            piece = os.read(file, min(count - len(data), 2**20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


def _await(file: int, until: float) -> None:
    """Wait until a pipe can be read; raise `TimeoutError`, an `OSError`, at the deadline."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(file, select.POLLIN)
        if not poll.poll(max(until - time.monotonic(), 0) * 1000):
            raise TimeoutError


_ALL: weakref.WeakSet[TemplateProcess] = weakref.WeakSet()


def _forget_all() -> None:
    for each in list(_ALL):
        each.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
