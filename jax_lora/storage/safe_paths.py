"""Check the paths that callers give, and open no file outside of an untrusted folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jax_lora.errors import LoraError
from jax_lora.storage.schema import shown

_SHARED_BLOB = re.compile(r"(?P<folder>[0-9a-f]{2})[0-9a-f]{62}")
_LONGEST_NAME = 255  # bytes; file systems refuse longer ones in many ways


def given_path(path: str | os.PathLike[str], error: type[LoraError]) -> Path:
    """Return a path that a caller gives, if the file system can have such a file.

    The file need not exist. Without this check, a path that is too long, cannot be encoded or leads
    through an unreadable folder would cause exceptions of many types.

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
        where = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
        got = getattr(cause, "strerror", None) or str(cause)
        fix = "Correct the path, or the permissions of the folders above it."
        raise error(
            where, got=got, expected="a path that the file system accepts", fix=fix
        ) from cause
    return Path(path)


def contained(folder: Path, name: Any, error: type[LoraError]) -> Path:
    """Return the path of a folder's file of that name, without opening it.

    Raises:
      LoraError: An `error`, if the name has other parts than a file name, or the file is a link
        that leaves the folder.
    """
    if not _is_plain(name):
        expected = "the name of a file in the folder, without a path"
        fix = "Do not use this folder: its index refers to files outside it."
        raise error(folder, got=f"the file name {shown(name)}", expected=expected, fix=fix)
    path, expected, fix = folder / name, "a file in the folder", "Copy the file into the folder"
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as cause:  # links in a circle
        raise error(
            path, got=f"{type(cause).__name__}: {cause}", expected=expected, fix=f"{fix}."
        ) from cause
    if target.parent != root and not _is_hub_blob(target, root):
        raise error(
            path, got=f"a link to {target}", expected=expected, fix=f"{fix} if you trust it."
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
    repository, shared = root.parent.parent, _SHARED_BLOB.fullmatch(target.name)
    stores = [repository / "blobs"]
    if shared is not None:
        stores.append(repository.parent / "blobs" / shared["folder"])
    return root.parent.name == "snapshots" and target.parent in stores
