"""Compiled programs that stay on the disk, so that the second run of a command starts at once."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from pathlib import Path

import jax

OFF = "JAX_LORA_NO_CACHE"
FOLDER = "JAX_COMPILATION_CACHE_DIR"  # JAX's own
LEAST_SECONDS = 1.0  # a program that compiles sooner is not worth a file


@dataclasses.dataclass(frozen=True)
class CompileCache:
    """Where compiled programs are kept.

    Args:
      folder: The folder.
      why_off: Why nothing is kept; nothing if it is.
    """

    folder: Path
    why_off: str = ""

    @property
    def size(self) -> int:
        """Bytes of the files that are there."""
        if not self.folder.is_dir():
            return 0
        return sum(_size(file) for file in self.folder.rglob("*"))


def use_compile_cache() -> CompileCache:
    """Keep compiled programs on the disk from here on; called before the first is compiled.

    A cache spares seconds and is needed for nothing: where it cannot be, the run goes on without.

    Returns:
      Where programs are kept, or why none are.
    """
    found = find_compile_cache()
    if found.why_off:
        return found
    jax.config.update("jax_compilation_cache_dir", str(found.folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return found


def find_compile_cache() -> CompileCache:
    """Find the folder, and try whether it can be written to; it is made if it is not there.

    Returns:
      The folder that `JAX_COMPILATION_CACHE_DIR` names, or else one among the user's caches.
    """
    folder = _folder()
    if os.environ.get(OFF, "0") not in ("", "0"):
        return CompileCache(folder, f"{OFF} is set")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return CompileCache(folder, f"the folder cannot be made: {error.strerror}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return CompileCache(folder, "the folder cannot be written to")
    return CompileCache(folder)


def _folder() -> Path:
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "jax_lora" / _machine()
    return Path("~/.cache/jax_lora/xla").expanduser() / _machine()


def _machine() -> str:
    """Tell processors apart: a home that several machines share must not mix their programs.

    XLA compiles for the instructions of the processor at hand, and JAX's keys do not name them all.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux
        lines = []
    named = ("flags", "Features", "model name", "CPU part")
    features = dict(line.split(":", 1) for line in lines if line.startswith(named))
    text = repr((platform.machine(), platform.processor(), sorted(features.items())))
    return f"{platform.machine()}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:  # another process has just taken it away
        return 0
