"""Check the files of a folder against a list of SHA-256 hashes, before anything is read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jax_lora.errors import ModelError

_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")


def check_pins(folder: Path, pins: str | os.PathLike[str]) -> None:
    """Raise unless a folder has exactly the files of a list, with the same contents.

    The list is the output of `sha256sum`: a hash and a name on each line. Names are relative to the
    folder or to the working directory. Hidden files are left out, as nothing reads them.

    Raises:
      ModelError: The list cannot be read, a file differs or is missing, or a file of the folder is
        not in the list.
    """
    pinned = {_relative(name, folder): digest for name, digest in _read_pins(Path(pins))}
    present = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    present.pop(Path(os.path.relpath(pins, folder)).as_posix(), None)  # the list itself
    problems = [f"{name}: no such file" for name in sorted(set(pinned) - set(present))]
    problems += [f"{name}: not in the list" for name in sorted(set(present) - set(pinned))]
    for name in sorted(set(pinned) & set(present)):
        if _digest(present[name]) != pinned[name]:
            problems.append(f"{name}: another SHA-256 hash")
    if problems:
        fix = (
            "Do not use this folder unless you know why it differs. To pin its present files: "
            "cd FOLDER && sha256sum * > PINS"
        )
        raise ModelError(folder, got=problems, expected=f"exactly the files in {pins}", fix=fix)


def _read_pins(pins: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = pins.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise _unreadable(pins, str(error)) from error
    if not any(map(str.strip, lines)):
        raise _unreadable(pins, "an empty file")
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is not None:
            yield match["name"], match["digest"].lower()
        elif line.strip():
            raise _unreadable(pins, f"line {number}: {line[:100]!r}")


def _unreadable(pins: Path, got: str) -> ModelError:
    expected = "the output of sha256sum: a hash and a file name on each line"
    return ModelError(
        pins, got=got, expected=expected, fix="Write it with: cd FOLDER && sha256sum * > PINS"
    )


def _relative(name: str, folder: Path) -> str:
    """Return a listed name relative to the folder; it may be relative to the working directory."""
    name = os.path.normpath(name)
    if not (folder / name).exists() and Path(name).exists():
        name = os.path.relpath(name, folder)
    return Path(name).as_posix()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error)  # equal to no hash
