"""Lock a folder, so that only one writer at a time uses it.

The lock is an advisory lock of the operating system on the file `.lock` in the folder. It ends with
its process, so a file that a killed process left behind locks nothing. The file describes the
writer, for the message that refuses a second one; it is removed when the writer is done. A copy of
it in a copied folder is without effect. Where a file system has no locks, nothing is locked.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from jax_lora.errors import LoraError
from jax_lora.storage.atomic_writes import convert_os_errors

LOCK = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_BUSY = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK}
_TRIES = 100
_PLACE = 2**30  # Windows lets nobody read locked bytes, so the lock is far behind the description


class FolderLock:
    """The lock of an existing folder, held by this object until `release`.

    Threads of one process exclude each other as well.

    Raises:
      LoraError: An `error`, if another writer holds the lock, with its description; or the folder
        cannot be written to.
    """

    def __init__(self, folder: Path, error: type[LoraError]):
        """Take the lock, without waiting."""
        self.file, self._error = folder / LOCK, error
        with convert_os_errors(folder, error):
            number = _take(self.file)
        if number is None:
            got = f"another writer at work in this folder: {_owner(self.file)}"
            fix = "Wait until it is done, stop it, or write to another folder."
            raise error(folder, got=got, expected="one writer at a time", fix=fix)
        self._number: int | None = number
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether the lock has not been released."""
        return self._number is not None

    def rename_folder(self, folder: Path) -> None:
        """Rename the locked folder, and stay its holder.

        Windows renames no folder with an open file, so the lock is released there.
        """
        if os.name == "nt":
            self.release()
        os.rename(self.file.parent, folder)
        self.file = folder / LOCK

    def exchange(self, folder: Path) -> None:
        """Give the lock back, and take that of another existing folder first.

        Raises:
          LoraError: Another writer holds its lock; this object then holds the earlier one.
        """
        other = FolderLock(folder, self._error)
        self.release()
        self.file, self._number, other._number = other.file, other._number, None
        _held.discard(other)
        _held.add(self)

    def release(self) -> None:
        """Give the lock back, and remove its file."""
        _held.discard(self)
        number, self._number = self._number, None
        if number is None:
            return
        if os.name != "nt" and _is_file(number, self.file):
            with contextlib.suppress(OSError):
                self.file.unlink()  # while it is locked, so that nobody else has locked it
        os.close(number)
        if os.name == "nt":  # which does not remove an open file
            with contextlib.suppress(OSError):
                self.file.unlink()


_held: set[FolderLock] = set()


def _forget_all() -> None:
    """Close the files in a forked process, without giving the parent's locks back."""
    while _held:
        lock = _held.pop()
        number, lock._number = lock._number, None
        if number is not None:
            os.close(number)


if hasattr(os, "register_at_fork"):  # or a forked worker would hold the lock of a killed parent
    os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def locked(folder: Path, error: type[LoraError]) -> Iterator[FolderLock]:
    """Hold the `FolderLock` of a folder.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name, locked(Path(name), LoraError):
      ...     with locked(Path(name), LoraError):
      ...         pass
      Traceback (most recent call last):
      ...
      jax_lora.errors.LoraError: ...
    """
    lock = FolderLock(folder, error)
    try:
        yield lock
    finally:
        lock.release()


def _take(file: Path) -> int | None:
    """Open and lock the file; None if it is locked."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link could lead anywhere
    for _ in range(_TRIES):
        number = os.open(file, flags, 0o644)
        try:
            if not _lock(number):
                os.close(number)
                return None
            if _is_file(number, file):
                _describe(number)
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # its holder removed it between the two calls
    return None


def _lock(number: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(number, _PLACE, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        if cause.errno in _BUSY:
            return False
        if cause.errno not in _UNSUPPORTED:
            raise
    return True


def _is_file(number: int, file: Path) -> bool:
    """Tell whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(number), os.lstat(file))
    except OSError:
        return False


def _describe(number: int) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv)[:500],
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk; the lock itself needs no space
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        os.write(number, (json.dumps(owner) + "\n").encode())


def _owner(file: Path) -> str:
    """Describe the holder of a lock by its file, which may hold anything."""
    try:
        with file.open("rb") as stream:
            owner = json.loads(stream.read(4096))
        text = (
            f"process {owner['pid']} on {owner['host']}, started {owner['started']}: "
            f"{owner['command']}"
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "a process that is starting"
    return "".join(c if c.isprintable() else "?" for c in text)[:700]
