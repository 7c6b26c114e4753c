"""Problems of a system, each with a fix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from jax_lora.cli.system_info import CLI_PACKAGES, OPTIONAL, REQUIRED, SystemInfo
from jax_lora.errors import install_command
from jax_lora.finetune.compile_cache import CompileCache
from jax_lora.plan.units import show_bytes

LEAST_JAX = (0, 10)
LEAST_BYTES = 10**9  # of free disk (a run keeps several checkpoints) and of free memory

# Accelerator -> JAX platform, and the extra of the `jax` package that supports it.
_PLATFORMS = {"NVIDIA GPU": "gpu", "AMD GPU": "gpu", "TPU": "tpu"}
_EXTRAS = {"NVIDIA GPU": "cuda13", "AMD GPU": "rocm7-local", "TPU": "tpu"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem.

    Args:
      stops: Whether it stops a run or leaves an accelerator unused; False for a note.
      what: The problem.
      fix: How to solve it.
    """

    stops: bool
    what: str
    fix: str


def check(info: SystemInfo, cache: CompileCache) -> list[Finding]:
    """Find the problems of a system; those that stop a run come first."""
    found = [
        *_packages(info.versions),
        *_devices(info),
        *_resources(info),
        *_environment(info),
        *_cache(cache),
    ]
    return sorted(found, key=lambda finding: not finding.stops)


def _packages(versions: dict[str, str | None]) -> Iterator[Finding]:
    for packages, stops, fix in (
        (dict.fromkeys(REQUIRED, ""), True, install_command()),
        (CLI_PACKAGES, True, install_command("cli")),
        (OPTIONAL, False, f"If you need it: {install_command('parquet,hub')}"),
    ):
        for name, use in packages.items():
            if versions.get(name) is None:
                purpose = f" ({use})" if use else ""
                yield Finding(stops, f"{name}{purpose} is not installed", fix)
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if jax is not None and _release(jax) < LEAST_JAX:
        yield Finding(True, f"jax {jax} is older than 0.10", "pip install -U jax")
    if jax is not None and jaxlib is not None and _release(jax) != _release(jaxlib):
        what = f"jax {jax} and jaxlib {jaxlib} are different releases"
        yield Finding(True, what, f"pip install jaxlib=={jax}")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _devices(info: SystemInfo) -> Iterator[Finding]:
    if info.devices_error:
        fix = "unset JAX_PLATFORMS, or install the platform that it names"
        yield Finding(True, f"JAX found no device: {info.devices_error}", fix)
        return
    seen = {device.platform for device in info.devices}
    platforms = info.environment.get("JAX_PLATFORMS")
    hidden = info.environment.get("CUDA_VISIBLE_DEVICES")
    for driver in info.drivers:
        if _PLATFORMS[driver] in seen:
            continue
        if platforms:
            fix = f"unset JAX_PLATFORMS, now {platforms!r}"
        elif driver == "NVIDIA GPU" and hidden in ("", "-1"):
            fix = f"unset CUDA_VISIBLE_DEVICES, now {hidden!r}"
        else:
            fix = f"pip install -U 'jax[{_EXTRAS[driver]}]'"
        yield Finding(True, f"{driver} listed by the driver, but not used by JAX", fix)


def _resources(info: SystemInfo) -> Iterator[Finding]:
    if math.ceil(info.usable) < info.cores:
        what = f"this process may use {info.usable:g} of {info.cores} cores"
        yield Finding(False, what, "raise the CPU limit of the container or job")
    if info.disk_free < LEAST_BYTES:
        what = f"only {show_bytes(info.disk_free)} of disk space are free here"
        yield Finding(True, what, "free disk space, or choose another disk with --adapter-path")
    if info.memory_free is not None and info.memory_free < LEAST_BYTES:
        what = f"only {show_bytes(info.memory_free)} of memory are free"
        fix = "end other processes; jax-lora plan shows how much memory a run needs"
        yield Finding(True, what, fix)


def _environment(info: SystemInfo) -> Iterator[Finding]:
    on = {name for name, value in info.environment.items() if value.lower() in ("1", "true")}
    if "JAX_DISABLE_JIT" in on:
        what = "JAX_DISABLE_JIT is set: nothing is compiled, and training is very slow"
        yield Finding(True, what, "unset JAX_DISABLE_JIT")
    if "JAX_ENABLE_X64" in on:
        what = "JAX_ENABLE_X64 is set: 64-bit arrays need twice the memory"
        yield Finding(False, what, "unset JAX_ENABLE_X64, unless you need it")


def _cache(cache: CompileCache) -> Iterator[Finding]:
    if cache.why_off:
        is_set = "is set" in cache.why_off
        fix = "set JAX_COMPILATION_CACHE_DIR to a folder that you can write to"
        what = f"compiled functions are not cached: {cache.why_off}"
        yield Finding(False, what, "unset JAX_LORA_NO_CACHE" if is_set else fix)
