"""Data parallelism: shard the rows of a batch over devices; each has a copy of the model.

By default, JAX treats a CPU as one device. One device per core, each with part of the batch, trains
a small model about 1.6 times as fast on two cores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MOST_CPU_DEVICES = 8
# Each CPU device has a copy of the base model, in the same memory.
MOST_CPU_COPIES = 2_000_000_000  # bytes


def use_all_cores() -> None:
    """Use one JAX device per CPU core. It has no effect after JAX has initialized its devices."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return  # the user has
    affinity = getattr(os, "sched_getaffinity", None)  # respects container limits on Linux
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", min(cores, MOST_CPU_DEVICES))
    except RuntimeError:
        return  # JAX has already initialized its devices


def data_mesh(rows: int, base: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """Choose the devices that share the rows of a batch.

    Args:
      rows: Rows of a micro-batch.
      base: Parameters of the base model.
      devices: The devices; None: all of this process.

    Returns:
      A mesh with the axis `"data"`, whose size divides the rows.
    """
    devices = jax.local_devices() if devices is None else devices
    most = min(len(devices), rows)
    if devices[0].platform == "cpu":
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
        most = min(most, max(1, MOST_CPU_COPIES // max(size, 1)))
    count = next(count for count in range(most, 0, -1) if rows % count == 0)
    return Mesh(np.asarray(devices[:count]), ("data",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicate every array on all devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_rows(batch: Any, mesh: Mesh) -> Any:
    """Shard the rows of every array over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
