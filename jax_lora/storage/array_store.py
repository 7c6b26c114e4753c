"""Store arrays as an Orbax checkpoint, and check its files against checksums."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import logging
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_lora.errors import CheckpointError
from jax_lora.storage import atomic_writes, multihost
from jax_lora.storage.limits import limit, limit_hint
from jax_lora.storage.ocdbt_index import INDEX_LIMIT
from jax_lora.storage.stored_arrays import check_stored

_SPECIAL = re.compile(r"[*?\[\]#%]")  # special in a glob pattern or a URL


def write_arrays(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write NumPy arrays by name with Orbax to a new folder, and flush it to the disk.

    Raises:
      CheckpointError: Writing failed; what was written has been removed.
    """
    import orbax.checkpoint as ocp  # imported on use, as it takes seconds

    arrays = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, arrays)
    handler, kinds = _handler_class()(), ocp.type_handlers
    registry = kinds.create_type_handler_registry(
        (np.ndarray, handler), (jax.Array, kinds.ArrayHandler())
    )
    new = not folder.exists()
    try:
        with (
            _quiet_threads(),
            _checkpointer(ocp, registry) as checkpointer,
            _literal(folder) as name,
        ):
            checkpointer.save(name, args=ocp.args.PyTreeSave(arrays))  # type: ignore[call-arg]
        if not handler.failures:
            atomic_writes.sync(folder)
            return
        cause = handler.failures[0]
    except Exception as error:  # Orbax raises many types
        cause = handler.failures[0] if handler.failures else error
    except BaseException:
        _remove_unfinished(folder, new)
        raise
    _remove_unfinished(folder, new)
    raise atomic_writes.write_error(folder, CheckpointError, cause) from cause


@contextlib.contextmanager
def _literal(folder: Path) -> Iterator[Path]:
    """Yield a path to the folder without special characters, because Orbax passes it to `glob`."""
    folder = folder.absolute()
    if not _SPECIAL.search(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as top:
        link = Path(top) / "parent"
        link.symlink_to(folder.parent, target_is_directory=True)
        yield link / folder.name


def _remove_unfinished(folder: Path, new: bool) -> None:
    unfinished = list(folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"))
    for each in [*unfinished, *([folder] if new else [])]:
        atomic_writes.remove(each)


@functools.cache
def _handler_class() -> Any:
    import orbax.checkpoint as ocp

    class PatientHandler(ocp.type_handlers.NumpyHandler):
        """Collects errors until all writes have ended.

        Orbax writes arrays concurrently, and closes the event loop at the first error. The other
        writes would then continue in a closed loop, and into a folder that is being removed.
        """

        def __init__(self) -> None:
            super().__init__()
            self.failures: list[Exception] = []

        async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
            try:
                await super()._open_and_write(*args, **kwargs)
            except Exception as error:
                self.failures.append(error)

    return PatientHandler


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep the tracebacks of Orbax's threads off the screen, and wait for these threads.

    The caller receives the same error as an exception.
    """
    log, running = logging.getLogger("absl"), set(threading.enumerate())

    def is_not_from_a_thread(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    log.addFilter(is_not_from_a_thread)
    try:
        yield
    finally:
        for thread in set(threading.enumerate()) - running:
            if type(thread).__module__.startswith("orbax."):
                with contextlib.suppress(Exception):  # `join` raises the error of the thread
                    thread.join()
        log.removeFilter(is_not_from_a_thread)


def read_arrays(folder: Path, template: Mapping[str, Any]) -> Any:
    """Read a tree of NumPy arrays with Orbax, given the expected tree of `jax.ShapeDtypeStruct`s.

    Raises:
      Exception: The files hold another tree, or arrays of other shapes or types. The type depends
        on Orbax and TensorStore.
    """
    import orbax.checkpoint as ocp

    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
    restore = ocp.args.PyTreeRestore(item=template, restore_args=as_numpy)  # type: ignore[call-arg]
    with _checkpointer(ocp) as checkpointer, _literal(folder) as name:
        check_stored(name, template)
        return checkpointer.restore(name, args=restore)


def _checkpointer(ocp: Any, registry: Any = None) -> Any:
    options = multihost.orbax_options()
    more = {} if registry is None else {"type_handler_registry": registry}
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options, **more)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def checksums(folder: Path) -> dict[str, str]:
    """Hash every file in a folder; return the hashes by relative file names."""
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {_name(folder, each): _checksum(each) for each in files}


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def file_problems(folder: Path, files: Mapping[str, str], declared: int) -> list[str]:
    """Check every file against its checksum, because Orbax does not detect a damaged index.

    `files` are from `checksums`, and `declared` are the bytes of the expected arrays; files that
    are much larger are not read.

    Returns:
      A line for every file that is missing, changed, new, or a link that leaves the folder.
    """
    try:
        root = folder.resolve()
        if root != folder.parent.resolve() / folder.name:
            return [f"{folder.name}: is a link that leaves the folder"]
    except (OSError, RuntimeError) as error:  # circular links
        return [f"{folder.name}: {error}"]
    size = sum(each.stat().st_size for each in root.rglob("*") if each.is_file())
    if size > declared + limit(INDEX_LIMIT):
        text = f"{size:,} bytes of files for arrays of {declared:,} bytes"
        return [f"{folder.name}: {text}. {limit_hint(INDEX_LIMIT)}"]
    problems = [f"{folder.name}/{problem}" for problem in listed_problems(root, files)]
    names = {_name(root, each) for each in root.rglob("*") if not each.is_dir()}
    return problems + [
        f"{folder.name}/{name}: is not in the manifest" for name in sorted(names - set(files))
    ]


def listed_problems(root: Path, files: Mapping[str, str]) -> list[str]:
    """Check the listed files of a folder against their `checksums`, and no others.

    Returns:
      A line for every file that is missing, changed, or a link that leaves the folder.
    """
    root = root.resolve()
    return [
        f"{name}: {why}"
        for name, checksum in files.items()
        if (why := _file_problem(root, name, checksum))
    ]


def _file_problem(root: Path, name: str, checksum: str) -> str | None:
    file = root / name
    try:
        if not file.resolve().is_relative_to(root):
            return "is a link that leaves the folder"
        if not file.is_file():
            return "is missing"
        return None if _checksum(file) == checksum else "does not match its checksum"
    except (OSError, ValueError, RuntimeError) as error:  # for example an invalid name
        return f"cannot be read: {type(error).__name__}"


def _name(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()
