"""The persistent compilation cache, which makes later runs start faster."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from pathlib import Path

import jax

OFF = "JAX_LORA_NO_CACHE"
FOLDER = "JAX_COMPILATION_CACHE_DIR"  # JAX's own
LEAST_SECONDS = 1.0  # functions that compile faster are not cached


@dataclasses.dataclass(frozen=True)
class CompileCache:
    """The location and state of the compilation cache.

    Args:
      folder: The folder.
      why_off: Why the cache is disabled; empty if it is enabled.
    """

    folder: Path
    why_off: str = ""

    @property
    def size(self) -> int:
        """Return the size of the cached files in bytes."""
        return sum(map(_size, self.folder.rglob("*")))


def use_compile_cache() -> CompileCache:
    """Enable the persistent compilation cache. Call it before the first compilation.

    If the folder cannot be used, the cache stays disabled and no error is raised.

    Returns:
      The cache, with the reason if it is disabled.
    """
    found = find_compile_cache()
    if not found.why_off:
        jax.config.update("jax_compilation_cache_dir", str(found.folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return found


def find_compile_cache() -> CompileCache:
    """Find the folder of the cache, create it if necessary, and check that it is writable.

    Returns:
      The cache in `JAX_COMPILATION_CACHE_DIR`, or else in the user's cache folder.
    """
    if os.environ.get(FOLDER):
        folder = Path(os.environ[FOLDER])
    elif os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"]) / "jax_lora" / _machine()
    else:
        folder = Path("~/.cache/jax_lora/xla").expanduser() / _machine()
    if os.environ.get(OFF, "0") not in ("", "0"):
        return CompileCache(folder, f"{OFF} is set")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return CompileCache(folder, f"the folder cannot be made: {error.strerror}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return CompileCache(folder, "the folder cannot be written to")
    return CompileCache(folder)


def _machine() -> str:
    """Identify the processor, because machines may share a home folder.

    XLA compiles for the instruction set of the processor, which JAX's keys do not fully cover.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = ("flags", "Features", "model name", "CPU part")
    features = dict(line.split(":", 1) for line in lines if line.startswith(named))
    text = repr((platform.machine(), platform.processor(), sorted(features.items())))
    return f"{platform.machine()}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:  # another process may have deleted it
        return 0
