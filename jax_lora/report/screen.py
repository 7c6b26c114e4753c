"""Keep text that a command prints from controlling the terminal, wherever it came from."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from jax_lora.printable import PROSE, printable


class ScreenedStream:
    """A text stream that escapes control characters other than newline and tab.

    Args:
      stream: The stream to write to.
    """

    def __init__(self, stream: Any):
        """Write to `stream`."""
        self.unscreened = stream

    def write(self, text: str) -> int:
        """Write the escaped text."""
        shown = printable(text, keep=PROSE)
        try:
            self.unscreened.write(shown)
        except UnicodeEncodeError as error:  # the terminal's encoding is not UTF-8
            encoded = shown.encode(error.encoding, "backslashreplace")
            self.unscreened.write(encoded.decode(error.encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each escaped line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self.unscreened, name)


def unscreened(stream: Any) -> Any:
    """Return the stream below a screened one, to write control characters on purpose."""
    return getattr(stream, "unscreened", stream)


def screen_again(before: tuple[Any, Any]) -> None:
    """Screen the streams that replaced standard output and standard error, if those were."""
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        now = getattr(sys, name)
        if now is not stream and isinstance(stream, ScreenedStream):
            setattr(sys, name, ScreenedStream(now))


@contextlib.contextmanager
def screened() -> Iterator[None]:
    """Screen standard output and standard error in a block, and the traceback that ends it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(ScreenedStream, before)
    try:
        yield
    except Exception:
        sys.excepthook = _print_screened  # Python prints the traceback after this block
        raise
    finally:
        sys.stdout, sys.stderr = before


def _print_screened(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    traceback.print_exception(kind, error, trace, file=ScreenedStream(sys.stderr))
