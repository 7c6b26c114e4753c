"""Resolve Hub names in options, and show transfers on the screen."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from jax_lora.hub.snapshots import local_folder
from jax_lora.report.screen import unscreened


@contextlib.contextmanager
def transfer(line: str) -> Iterator[None]:
    """Print a line about a transfer, and let its progress bars control the terminal in a block.

    Both go to standard error, because standard output may be JSON.
    """
    print(line, file=sys.stderr)
    with contextlib.redirect_stderr(unscreened(sys.stderr)):
        yield


def find_folder(name: str, *, weights: bool = True) -> Path:
    """Return the folder that an option means: a local one, which may not exist, or of a Hub name.

    Args:
      name: A path, or `owner/name` with or without `@revision`.
      weights: Whether the weights are needed, or only the configuration and the tokenizer.

    Raises:
      HubError: The name cannot be found or downloaded.
    """
    return local_folder(name, transfer, weights=weights)
