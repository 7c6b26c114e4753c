"""Write files and folders beside their place and rename them: all of it or nothing.

A reader never sees an unfinished file. If writing fails, is interrupted or is killed, the earlier
file is unchanged; after a failure the unfinished one is removed. Every failure of the file system
becomes an error of this library, with a fix.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from jax_lora.errors import LoraError

PART = ".part"  # suffix of what is not complete
OLD = ".old"  # suffix of an earlier file while several files are replaced

_FIXES = {
    errno.ENOSPC: "Free some space on this file system, or write to another one.",
    errno.EDQUOT: "Free some space within your quota, or write to another file system.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or write to another file system.",
    errno.EROFS: "The file system is read-only: write to another one.",
    errno.EACCES: "Write to a folder in which you may create files.",
    errno.EPERM: "Write to a folder in which you may create files.",
    errno.ENOENT: "Create the folder first, or check the path.",
    errno.ENOTDIR: "A file has the name of a folder in this path: move the file, or write "
    "elsewhere.",
    errno.EEXIST: "Move the file of that name, or write elsewhere.",
    errno.EISDIR: "A folder has the name of the file: name another file.",
    errno.ENOTEMPTY: "Move the folder of that name, or write elsewhere.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Replace the symbolic link by a file or a folder.",
    errno.EIO: "Check the disk, and write to another one.",
    errno.EMFILE: "Close some files, or raise the limit on open files (ulimit -n).",
}


@contextlib.contextmanager
def convert_os_errors(where: str | Path, error: type[LoraError]) -> Iterator[None]:
    """Raise every failure of the file system as an error of this library.

    Raises:
      LoraError: An `error`, from the `OSError` that was raised within.
    """
    try:
        yield
    except OSError as cause:
        raise write_error(where, error, cause) from cause


def write_error(where: str | Path, error: type[LoraError], cause: Exception) -> LoraError:
    """Return the exception for a failure to write, with a fix that suits the cause.

    The cause is an `OSError`, or the exception of a library that met one.
    """
    if isinstance(cause, OSError):
        number, text = cause.errno, str(cause)
    else:  # a library reports the number by its text, if at all
        number = next((each for each in _FIXES if os.strerror(each) in str(cause)), None)
        kind = type(cause).__name__
        text = f"{kind}: {cause}" if number is None else f"{os.strerror(number)} ({kind})"
    got = " ".join(text.split())[:300]
    expected = "a place that can be written to, with enough free space"
    fix = _FIXES.get(number or 0, "Free some space, or write elsewhere.")
    return error(
        f"writing {where}",
        got=got,
        expected=expected,
        fix=f"{fix} Whatever was there is unchanged.",
    )


# -----------------------------------------------------------------------------------------------
# One file, or one folder
# -----------------------------------------------------------------------------------------------


def write_file(path: Path, content: str | bytes, error: type[LoraError]) -> None:
    """Write a file, or replace it: text as UTF-8 with its line ends unchanged, or bytes.

    A link is followed; a device or a pipe is written to directly.

    Raises:
      LoraError: An `error`, if writing fails; the earlier file is unchanged.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_file(Path(folder) / "notes.txt", "new", LoraError)
      ...     [file.name for file in Path(folder).iterdir()]
      ['notes.txt']
    """
    with replacing(path, error) as part:
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8", newline="")
        else:
            part.write_bytes(content)


def append_text(path: Path, text: str, error: type[LoraError]) -> None:
    """Append text to a file, created if necessary, or leave the file unchanged.

    Raises:
      LoraError: An `error`, if writing fails.
    """
    with convert_os_errors(path, error), path.open("ab", buffering=0) as stream:
        size, data = stream.tell(), text.encode("utf-8")
        try:
            while data:  # an almost full disk takes a part
                data = data[stream.write(data) :]
        except BaseException:
            with contextlib.suppress(OSError):
                stream.truncate(size)
            raise


@contextlib.contextmanager
def replacing(path: Path, error: type[LoraError]) -> Iterator[Path]:
    """Yield another name to write a file or a folder to, and rename it when it is complete.

    A file at `path` is replaced, and so is an empty folder.

    Raises:
      LoraError: An `error`, if writing fails; `path` is unchanged.
    """
    with convert_os_errors(path, error):
        target = Path(os.path.realpath(path))
        if target.exists() and not (target.is_file() or target.is_dir()):
            yield target  # /dev/stdout, say, which nothing must replace
            return
        part = part_of(target)
        try:
            yield part
            if target.is_file() and part.is_file():
                shutil.copymode(target, part)
            sync(part)
            os.replace(part, target)
        except BaseException:
            remove(part)
            raise
        sync_folder(target.parent)


def part_of(path: Path, suffix: str = PART) -> Path:
    """Return the name of the unfinished form of a file or a folder, beside it."""
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex[:8]}{suffix}")


def remove_parts(folder: Path, *names: str) -> None:
    """Remove what killed processes left unfinished in a locked folder, by patterns of its names."""
    for name in names:
        for part in folder.glob(f"{name}.????????{PART}"):
            remove(part)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def made_folder(folder: Path, error: type[LoraError]) -> Iterator[None]:
    """Create a folder to write in, with its parents; it is removed if it is empty after a failure.

    Raises:
      LoraError: An `error`, if it cannot be created.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        with convert_os_errors(folder, error):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


# -----------------------------------------------------------------------------------------------
# Two files that belong together
# -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing_both(
    folder: Path, weights: str, index: str, error: type[LoraError]
) -> Iterator[tuple[Path, Path]]:
    """Yield paths to write two files of a locked folder to; replace the earlier ones together.

    Files whose bytes are unchanged are not replaced. If both are, the earlier ones are moved aside
    first, and come back if anything fails. A process that is killed in between leaves a folder
    without the index, never an old and a new file together; the next call, or `recover`, brings the
    earlier files back. The other file, the weights, is not used without the index.

    Raises:
      LoraError: An `error`, if writing fails; the earlier files are unchanged.
    """
    with convert_os_errors(folder, error):
        recover(folder, weights, index)
        remove_parts(folder, weights, index)
        parts = {name: part_of(folder / name) for name in (weights, index)}
        try:
            yield parts[weights], parts[index]
            changed = [name for name in parts if not _same(parts[name], folder / name)]
            for name in changed:
                sync(parts[name])
            _swap(folder, {name: parts[name] for name in changed})
        finally:
            for part in parts.values():
                remove(part)
    sync_folder(folder)


def is_interrupted(folder: Path, index: str) -> bool:
    """Tell whether a process was killed while it replaced two files of a folder."""
    return not os.path.lexists(folder / index) and any(folder.glob(f"{index}.????????{OLD}"))


def recover(folder: Path, weights: str, index: str) -> None:
    """Undo a replacement in a locked folder that a killed process did not finish."""
    unfinished = not os.path.lexists(folder / index)
    for name in (weights, index):  # the index last: until then, a kill changes nothing
        for kept in folder.glob(f"{name}.????????{OLD}"):
            if unfinished:
                os.replace(kept, folder / name)
            else:
                remove(kept)


def _same(one: Path, other: Path) -> bool:
    """Tell whether two small files are equal; large ones are taken to differ."""
    if not other.is_file() or other.is_symlink():
        return False
    size = one.stat().st_size
    return size == other.stat().st_size < 2**20 and one.read_bytes() == other.read_bytes()


def _swap(folder: Path, parts: Mapping[str, Path]) -> None:
    if len(parts) == 1:
        for name, part in parts.items():
            os.replace(part, folder / name)
        return
    aside: dict[str, Path] = {}
    done: list[str] = []
    try:
        for name in reversed(list(parts)):
            if os.path.lexists(folder / name):
                kept = part_of(folder / name, OLD)
                os.rename(folder / name, kept)
                aside[name] = kept
        for name, part in parts.items():
            os.replace(part, folder / name)
            done.append(name)
    except BaseException:
        for name in done:
            remove(folder / name)
        for name, kept in aside.items():
            os.replace(kept, folder / name)
        raise
    for kept in aside.values():
        remove(kept)


# -----------------------------------------------------------------------------------------------
# Onto the disk
# -----------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk.

    A rename must not be there before the contents that it stands for.
    """
    if not path.is_dir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
        return
    for each in path.iterdir():
        if not each.is_symlink():
            sync(each)
    sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can.

    A failure is no error: whichever of two names the disk has, its contents are complete.
    """
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
