"""Measure the memory of this process and its devices, and recognize that there is none left."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import jax


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device or the machine is out of memory.

    Args:
      error: Any error.

    Returns:
      True for a `MemoryError`, and for JAX's RESOURCE_EXHAUSTED.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def counts_resident_memory() -> bool:
    """Return whether `peak_memory` measures the process, because the device has no statistics."""
    return "peak_bytes_in_use" not in (jax.local_devices()[0].memory_stats() or {})


def device_memory() -> int | None:
    """Return the bytes of a device that arrays may occupy; None where it does not say (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def available_memory() -> int | None:
    """Return the bytes that further arrays may occupy; None if neither device nor host says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def resident_memory() -> int | None:
    """Return the resident memory of this process in bytes; None if the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def release_freed_memory() -> None:
    """Return memory that the process has freed to the system, where the C library is GNU's.

    Call it after compiling. The C library keeps the memory that the compiler has freed, hundreds of
    megabytes in small pieces, and places the arrays of a step elsewhere.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> float:
    """Measure the peak in gigabytes (10^9 bytes).

    Returns:
      Peak device memory; on devices without memory statistics (CPU), the peak resident memory of
      the process, Python and the compiler included; 0.0 if neither is available.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # kibibytes elsewhere
