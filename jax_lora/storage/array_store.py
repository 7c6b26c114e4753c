"""Store arrays as an Orbax checkpoint, with a checksum of each of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_lora.storage import multihost


def write_arrays(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write a tree of NumPy arrays with Orbax, which creates the folder."""
    import orbax.checkpoint as ocp  # imported on use, as it takes seconds

    with _checkpointer(ocp) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))  # type: ignore[call-arg]


def read_arrays(folder: Path, template: Mapping[str, Any]) -> Any:
    """Read a tree of NumPy arrays with Orbax.

    Args:
      folder: The folder of arrays.
      template: The expected tree of `jax.ShapeDtypeStruct`s.

    Returns:
      The arrays, with the shapes and types of the files.

    Raises:
      Exception: Orbax finds another tree; the type depends on Orbax.
    """
    import orbax.checkpoint as ocp

    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
    restore = ocp.args.PyTreeRestore(item=template, restore_args=as_numpy)  # type: ignore[call-arg]
    with _checkpointer(ocp) as checkpointer:
        return checkpointer.restore(folder.absolute(), args=restore)


def _checkpointer(ocp: Any) -> Any:
    options = multihost.orbax_options()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def checksums(folder: Path) -> dict[str, str]:
    """Hash every file in a folder.

    Args:
      folder: The folder.

    Returns:
      Hashes by relative file names.
    """
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {each.relative_to(folder).as_posix(): _checksum(each) for each in files}


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def file_problems(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Check every file against its checksum. Orbax does not detect a damaged index.

    Args:
      folder: The folder of arrays.
      files: Hashes by name, from `checksums`.

    Returns:
      A line for every file that is missing, changed, new, or a link that leaves the folder.
    """
    root = folder.resolve()
    if root != folder.parent.resolve() / folder.name:
        return [f"{folder.name}: is a link that leaves the folder"]
    problems = [
        f"{folder.name}/{name}: {why}"
        for name, checksum in files.items()
        if (why := _file_problem(root, name, checksum))
    ]
    extra = set(_names(root)) - set(files)
    return problems + [f"{folder.name}/{name}: is not in the manifest" for name in sorted(extra)]


def _file_problem(root: Path, name: str, checksum: str) -> str | None:
    file = root / name
    if not file.resolve().is_relative_to(root):
        return "is a link that leaves the folder"
    if not file.is_file():
        return "is missing"
    return None if _checksum(file) == checksum else "does not match its checksum"


def _names(root: Path) -> list[str]:
    return [each.relative_to(root).as_posix() for each in root.rglob("*") if not each.is_dir()]
