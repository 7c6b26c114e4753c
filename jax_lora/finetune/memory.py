"""Measure the memory of this process and its devices."""

from __future__ import annotations

import sys

import jax


def counts_resident_memory() -> bool:
    """Return whether `peak_memory` measures the process, because the device has no statistics."""
    return "peak_bytes_in_use" not in (jax.local_devices()[0].memory_stats() or {})


def device_memory() -> int | None:
    """Return the bytes of a device that arrays may occupy; None where it does not say (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


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
