"""System information: package versions, devices, memory, disk and cores."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from jax_lora.report.versions import version_of

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors")
# Package -> purpose.
CLI_PACKAGES = {
    "tokenizers": "tokenizers",
    "jinja2": "chat templates",
    "PyYAML": "configuration files",
    "rich": "progress display",
    "grain": "background data loading",
    "matplotlib": "plots",
    "tensorboardX": "TensorBoard logs",
}
OPTIONAL = {
    "pyarrow": "data in .parquet files",
    "huggingface_hub": "models and adapters by their names on the Hub",
}

# Accelerator -> folder and pattern of the files that its driver creates.
_DEVICE_FILES = {
    "NVIDIA GPU": ("proc/driver/nvidia/gpus", "*"),
    "AMD GPU": ("dev", "kfd"),
    "TPU": ("dev", "accel*"),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """A JAX device.

    Args:
      name: Device kind.
      platform: `"cpu"`, `"gpu"` or `"tpu"`.
      memory: Bytes that JAX may use, or None if the device does not report them.
      free: Unused bytes, or None.
    """

    name: str
    platform: str
    memory: int | None = None
    free: int | None = None


@dataclasses.dataclass(frozen=True)
class SystemInfo:
    """System information.

    The field names are the keys of `jax-lora doctor --json`.

    Args:
      versions: Package -> version, or None if it is not installed.
      devices: JAX devices.
      devices_error: Why JAX found no device, or an empty string.
      drivers: Kinds of accelerators that have device files, each once.
      cores: CPU cores.
      usable: Cores that this process may use, a fraction under a container's quota.
      memory: Bytes of memory, or None if unknown.
      memory_free: Bytes of free memory, or None if unknown.
      disk_free: Free bytes on the disk that a run writes to.
      environment: Environment variables that JAX reads.
    """

    versions: dict[str, str | None]
    devices: tuple[Device, ...]
    devices_error: str
    drivers: tuple[str, ...]
    cores: int
    usable: float
    memory: int | None
    memory_free: int | None
    disk_free: int
    environment: dict[str, str]


def collect_system_info(root: Path = Path("/"), run_folder: Path = Path(".")) -> SystemInfo:
    """Collect system information without changing anything.

    Args:
      root: Root of the file system.
      run_folder: Folder that a run writes to.
    """
    devices, error = _devices()
    memory, free = _memory(root)
    cores = os.cpu_count() or 1
    return SystemInfo(
        versions={name: version_of(name) for name in (*REQUIRED, *CLI_PACKAGES, *OPTIONAL)},
        devices=devices,
        devices_error=error,
        drivers=tuple(
            name
            for name, (folder, pattern) in _DEVICE_FILES.items()
            if any((root / folder).glob(pattern))
        ),
        cores=cores,
        usable=_usable_cores(root, cores),
        memory=memory,
        memory_free=free,
        disk_free=shutil.disk_usage(run_folder).free,
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("JAX_", "XLA_")) or name == "CUDA_VISIBLE_DEVICES"
        },
    )


def _devices() -> tuple[tuple[Device, ...], str]:
    try:
        devices = jax.local_devices()
    except Exception as error:  # backends raise exceptions of any type
        # JAX 0.10 raises an AssertionError without text if JAX_PLATFORMS names a missing platform.
        return (), (str(error).splitlines() or ["the requested platform was not found"])[0]
    return tuple(map(_device, devices)), ""


def _device(device: Any) -> Device:
    stats = device.memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    free = None if limit is None else limit - used
    return Device(device.device_kind, device.platform, limit, free)


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Return total and free memory, within the limits of the container."""
    total, free = _host_memory(root)
    # The limit and the usage of the container.
    limit = _read_int(root / "sys/fs/cgroup/memory.max")
    used = _read_int(root / "sys/fs/cgroup/memory.current")
    if total is None or limit is None or used is None or limit >= total:
        return total, free
    return limit, limit - used if free is None else min(free, limit - used)


def _host_memory(root: Path) -> tuple[int | None, int | None]:
    """Return total and free memory of the host, or None if unknown."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None, None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def _usable_cores(root: Path, cores: int) -> float:
    """Return the cores that the CPU affinity and the container's quota allow."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = float(len(affinity(0)) if affinity is not None else cores)
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return min(usable, int(quota) / int(period))
    except (OSError, ValueError):  # no quota: the file is missing or says "max"
        return usable


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # the file is missing or says "max"
        return None
