"""Check the model of a subcommand against the file of `--pin`, where its folder is first named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from jax_lora.storage.pinned_files import check_pins

# The file of hashes, and the folders that were checked against it.
_PIN: ContextVar[tuple[str, set[Path]] | None] = ContextVar("pin", default=None)


@contextlib.contextmanager
def pinned(file: str | None) -> Iterator[None]:
    """Check models in a block against a file, the output of `sha256sum`; None: check nothing."""
    token = _PIN.set(None if file is None else (file, set()))
    try:
        yield
    finally:
        _PIN.reset(token)


def check_model(folder: Path) -> None:
    """Raise if a model's folder differs from the file of hashes; it is read once.

    Raises:
      ModelError: A file differs.
    """
    pin = _PIN.get()
    if pin is not None and folder not in pin[1]:
        check_pins(folder, pin[0])
        pin[1].add(folder)
