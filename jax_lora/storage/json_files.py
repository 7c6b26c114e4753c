"""Read untrusted JSON files strictly, with a size limit and one error type."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

from jax_lora.errors import LoraError, format_error

MAX_BYTES = 16 * 2**20


def read_json(path: Path, error: type[LoraError], max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
      path: The file.
      error: Class of the exception to raise.
      max_bytes: Maximum size in bytes.

    Returns:
      The object.

    Raises:
      LoraError: An `error`, if the file is missing, too large, nested too deeply, or not a JSON
        object in UTF-8, or has a duplicate key, NaN or Infinity.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # bounded even if the reported file size is wrong
        if len(data) > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
        value = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
    except (OSError, ValueError, RecursionError) as cause:
        raise error(
            format_error(
                str(path),
                got=f"{type(cause).__name__}: {cause}",
                expected="a JSON object",
                fix="Check the path, and that the file is complete.",
            )
        ) from cause
    return value


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        raise ValueError("a duplicate key")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the value {name}")


def digest(value: Any) -> str:
    """Hash a JSON value, independent of the order of keys.

    Args:
      value: A value that `json.dumps` accepts.

    Returns:
      32 hexadecimal digits.

    Example:
      >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
      True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
