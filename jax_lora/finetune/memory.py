"""The most memory that a run has taken so far."""

from __future__ import annotations

import sys

import jax


def counts_resident_memory() -> bool:
    """Tell whether `peak_memory` is that of the whole process, for want of the device's own."""
    return "peak_bytes_in_use" not in (jax.local_devices()[0].memory_stats() or {})


def peak_memory() -> float:
    """Measure the peak in gigabytes (10^9 bytes).

    Returns:
      What the device reports; where it keeps no count (a CPU), the process's peak resident memory,
      Python and the compiler included; 0.0 where neither is known.
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
