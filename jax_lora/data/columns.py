"""Names that a data file has for the fields of a format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jax_lora.data.problem import Problem
from jax_lora.errors import ConfigError

_COLUMNS: ContextVar[Mapping[str, str] | None] = ContextVar("columns", default=None)


def parse_columns(text: str) -> dict[str, str]:
    """Parse `prompt=question,completion=answer`: fields and their names in the file.

    Raises:
      ConfigError: The text has another form.

    Example:
      >>> parse_columns("prompt=question,completion=answer")
      {'prompt': 'question', 'completion': 'answer'}
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {field.strip(): name.strip() for field, _, name in pairs}
    if len(found) < len(pairs) or not all(found) or not all(found.values()):
        raise ConfigError(
            "columns",
            got=repr(text),
            expected="FIELD=COLUMN, separated by commas",
            fix="Write, for example, prompt=question,completion=answer.",
        )
    return found


@contextlib.contextmanager
def renaming(columns: str | None) -> Iterator[None]:
    """Rename the columns of all data that is read in a block.

    Args:
      columns: As for `parse_columns`; None changes nothing.

    Yields:
      Nothing.
    """
    token = _COLUMNS.set(_COLUMNS.get() if columns is None else parse_columns(columns))
    try:
        yield
    finally:
        _COLUMNS.reset(token)


def rename(value: Any) -> Any:
    """Rename the columns of an example; only the named ones and the fields beside them remain.

    Raises:
      Problem: A column is missing.
    """
    columns = _COLUMNS.get()
    if not columns or not isinstance(value, dict):
        return value
    for name in columns.values():
        if name not in value:
            have = ", ".join(f'"{each}"' for each in list(value)[:10]) or "none"
            raise Problem(
                f'no column "{name}"; the columns are {have}',
                "Correct the name of the column in columns.",
            )
    rest = {name: value[name] for name in value if name not in {*columns, *columns.values()}}
    return {field: value[name] for field, name in columns.items()} | rest
