"""Check the paths that callers give, and open no file outside of an untrusted folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jax_lora.errors import LoraError, format_error
from jax_lora.storage.schema import shown

_SHARED_BLOB = re.compile(r"(?P<folder>[0-9a-f]{2})[0-9a-f]{62}")
_LONGEST_NAME = 255  # bytes; file systems refuse longer ones in many ways


def given_path(path: str | os.PathLike[str], error: type[LoraError]) -> Path:
    """Return a path that a caller gives, if the file system can have such a file.

    The file need not exist. Without this check, a path that is too long, cannot be encoded or leads
    through an unreadable folder would cause exceptions of many types.

    Args:
      path: The path.
      error: Class of the exception to raise.

    Returns:
      The path.

    Raises:
      LoraError: An `error`, if the file system refuses the path.

    Example:
      >>> given_path("no/such/file", LoraError).name
      'file'
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as cause:  # a null byte is a ValueError
        text = os.fspath(path)
        raise error(
            format_error(
                text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}...",
                got=getattr(cause, "strerror", None) or str(cause),
                expected="a path that the file system accepts",
                fix="Correct the path, or the permissions of the folders above it.",
            )
        ) from cause
    return Path(path)


def contained(folder: Path, name: Any, error: type[LoraError]) -> Path:
    """Return the path of a file in a folder, without opening it.

    Args:
      folder: The folder.
      name: The file name.
      error: Class of the exception to raise.

    Returns:
      The path.

    Raises:
      LoraError: An `error`, if the name has other parts than a file name, or the file is a link
        that leaves the folder.
    """
    if not _is_plain(name):
        raise error(
            format_error(
                str(folder),
                got=f"the file name {shown(name)}",
                expected="the name of a file in the folder, without a path",
                fix="Do not use this folder: its index refers to files outside it.",
            )
        )
    path = folder / name
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as cause:  # links in a circle
        raise error(
            format_error(
                str(path),
                got=f"{type(cause).__name__}: {cause}",
                expected="a file in the folder",
                fix="Copy the file into the folder.",
            )
        ) from cause
    if target.parent != root and not _is_hub_blob(target, root):
        raise error(
            format_error(
                str(path),
                got=f"a link to {target}",
                expected="a file in the folder",
                fix="Copy the file into the folder if you trust it.",
            )
        )
    return path


def _is_plain(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    if len(name.encode("utf-8", "replace")) > _LONGEST_NAME or not name.isprintable():
        return False
    return not any(c in '/\\:"' for c in name)


def _is_hub_blob(target: Path, root: Path) -> bool:
    """Tell whether a link is from `snapshots/<commit>/` to `blobs/` of a Hugging Face cache.

    A repository has `blobs/`, and so has the cache, in folders of two digits, for the files of all
    repositories.
    """
    repository = root.parent.parent
    stores = (target.parent == repository / "blobs", _is_shared_blob(target, repository.parent))
    return root.parent.name == "snapshots" and any(stores)


def _is_shared_blob(target: Path, cache: Path) -> bool:
    found = _SHARED_BLOB.fullmatch(target.name)
    return found is not None and target.parent == cache / "blobs" / found["folder"]
