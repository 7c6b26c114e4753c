"""What there is on this machine: versions, devices, memory, disk and processors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

import jax

# Package -> what it is for; those of the library first.
REQUIRED = {
    "jax": "", "jaxlib": "", "flax": "", "optax": "", "orbax-checkpoint": "", "numpy": "",
    "safetensors": "",
}  # fmt: skip
OF_THE_COMMAND = {
    "transformers": "tokenizers and chat templates",
    "tokenizers": "tokenizers",
    "jinja2": "chat templates",
    "PyYAML": "configuration files",
    "rich": "the screen of a run",
    "grain": "loading rows in the background",
    "matplotlib": "plots",
    "tensorboardX": "TensorBoard's logs",
}
OPTIONAL = {"pyarrow": "rows in .parquet files"}


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of JAX.

    Args:
      name: Its kind.
      platform: `"cpu"`, `"gpu"` or `"tpu"`.
      memory: Bytes that JAX may use of it, or None where it does not say.
      free: Bytes of them that are not in use, or None.
    """

    name: str
    platform: str
    memory: int | None = None
    free: int | None = None


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts.

    Args:
      versions: Package -> version, or None where it is not installed.
      devices: JAX's devices.
      devices_error: Why JAX has none.
      drivers: Accelerators that a driver of this machine shows.
      cores: Processors that there are.
      usable: Of which this process may use so many.
      memory: Bytes of memory, or None where nothing says.
      memory_free: Bytes of it that are free, or None.
      disk_free: Bytes free where a run would write.
      environment: Variables that change what JAX does.
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


def look(root: Path = Path("/"), here: Path = Path(".")) -> Machine:
    """Gather the facts; nothing is changed.

    Args:
      root: Where the system's files are.
      here: Where a run would write.

    Returns:
      The facts.
    """
    devices, error = _devices()
    memory, free = _memory(root)
    cores = os.cpu_count() or 1
    return Machine(
        versions={name: _version(name) for name in (*REQUIRED, *OF_THE_COMMAND, *OPTIONAL)},
        devices=devices,
        devices_error=error,
        drivers=_drivers(root),
        cores=cores,
        usable=_usable(root, cores),
        memory=memory,
        memory_free=free,
        disk_free=shutil.disk_usage(here).free,
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("JAX_", "XLA_")) or name == "CUDA_VISIBLE_DEVICES"
        },
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[tuple[Device, ...], str]:
    try:
        devices = jax.local_devices()
    except Exception as error:  # a doctor reports whatever a backend fails with
        # JAX 0.10 asserts, without a word, where JAX_PLATFORMS names what is not there.
        return (), (str(error).splitlines() or ["none of those that it looked for"])[0]
    return tuple(map(_device, devices)), ""


def _device(device: Any) -> Device:
    stats = device.memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    free = None if limit is None else limit - used
    return Device(device.device_kind, device.platform, limit, free)


def _drivers(root: Path) -> tuple[str, ...]:
    """Accelerators that the system shows, whatever JAX makes of them."""
    shown = {
        "NVIDIA GPU": ("proc/driver/nvidia/gpus", "*"),
        "AMD GPU": ("dev", "kfd"),
        "TPU": ("dev", "accel*"),
    }
    found = {name: len(list((root / at).glob(like))) for name, (at, like) in shown.items()}
    return tuple(name for name, count in found.items() for _ in range(count))


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Memory and what is free of it, no more than a container may use."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # another system than Linux
        return None, None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
    limit = _number(root / "sys/fs/cgroup/memory.max")
    used = _number(root / "sys/fs/cgroup/memory.current")
    if limit is not None and used is not None and total is not None and limit < total:
        total, free = int(limit), int(min(free or limit, limit - used))
    return total, free


def _usable(root: Path, cores: int) -> float:
    """Processors that this process may use: by its affinity, and by its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = float(len(affinity(0)) if affinity is not None else cores)
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return min(usable, int(quota) / int(period))
    except (OSError, ValueError):  # no quota, or none that is a number: "max"
        return usable


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
