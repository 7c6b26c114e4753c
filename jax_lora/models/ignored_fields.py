"""Fields of `config.json` that a block of code ignores in every model that it loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

_IGNORED: ContextVar[frozenset[str]] = ContextVar("ignored_fields", default=frozenset())


@contextlib.contextmanager
def ignoring(fields: Iterable[str]) -> Iterator[None]:
    """Ignore unknown fields of `config.json`, which do not change the outputs, in a block.

    Example:
      >>> with ignoring(["exporter_version"]):
      ...     sorted(ignored_fields())
      ['exporter_version']
    """
    token = _IGNORED.set(frozenset(fields))
    try:
        yield
    finally:
        _IGNORED.reset(token)


def ignored_fields() -> frozenset[str]:
    """Return the fields of the innermost `ignoring` block."""
    return _IGNORED.get()
