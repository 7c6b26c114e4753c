"""What is wrong with a machine, and what to do about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from jax_lora.finetune.compile_cache import CompileCache
from jax_lora.plan.machine import OF_THE_COMMAND, OPTIONAL, REQUIRED, Machine
from jax_lora.plan.units import show_bytes

LEAST_JAX = (0, 10)
LEAST_DISK = 10**9  # bytes; a run keeps several checkpoints
LEAST_MEMORY = 10**9

# Platform names of JAX for what drivers show, and the packages that make JAX see it.
_PLATFORMS = {"NVIDIA GPU": "gpu", "AMD GPU": "gpu", "TPU": "tpu"}
_INSTALL = {"NVIDIA GPU": "jax[cuda13]", "AMD GPU": "jax[rocm7-local]", "TPU": "jax[tpu]"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Args:
      stops: Whether a run fails, or goes without a device that is there; else it is a note.
      what: What was found.
      fix: What to do.
    """

    stops: bool
    what: str
    fix: str


def check(machine: Machine, cache: CompileCache) -> list[Finding]:
    """Find what is wrong.

    Args:
      machine: The facts.
      cache: Where compiled programs are kept.

    Returns:
      The findings, those that stop a run first.
    """
    found = [
        *_packages(machine),
        *_devices(machine),
        *_processors(machine),
        *_room(machine),
        *_environment(machine),
        *_cache(cache),
    ]
    return sorted(found, key=lambda finding: not finding.stops)


def _packages(machine: Machine) -> Iterator[Finding]:
    versions = machine.versions
    for name in REQUIRED:
        if versions.get(name) is None:
            yield Finding(True, f"{name} is not installed", "pip install jax-lora")
    for name, use in OF_THE_COMMAND.items():
        if versions.get(name) is None:
            yield Finding(True, f"{name} ({use}) is not installed", "pip install 'jax-lora[cli]'")
    for name, use in OPTIONAL.items():
        if versions.get(name) is None:
            fix = "pip install 'jax-lora[parquet]', if you need them"
            yield Finding(False, f"{name} ({use}) is not installed", fix)
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if jax is not None and _numbers(jax) < LEAST_JAX:
        yield Finding(True, f"jax is {jax}, older than 0.10", "pip install -U jax")
    if jax is not None and jaxlib is not None and _numbers(jax)[:2] != _numbers(jaxlib)[:2]:
        yield Finding(True, f"jax is {jax} and jaxlib {jaxlib}", f"pip install jaxlib=={jax}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _devices(machine: Machine) -> Iterator[Finding]:
    if machine.devices_error:
        fix = "unset JAX_PLATFORMS, or install what it asks for"
        yield Finding(True, f"JAX has no device: {machine.devices_error}", fix)
        return
    seen = {device.platform for device in machine.devices}
    for driver in dict.fromkeys(machine.drivers):
        if _PLATFORMS[driver] in seen:
            continue
        asked = machine.environment.get("JAX_PLATFORMS")
        hidden = machine.environment.get("CUDA_VISIBLE_DEVICES")
        if asked:
            fix = f"unset JAX_PLATFORMS, which is {asked!r}"
        elif driver == "NVIDIA GPU" and hidden in ("", "-1"):
            fix = f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"
        else:
            fix = f"pip install -U '{_INSTALL[driver]}'"
        what = f"{driver} shown by the driver, and JAX does not use it"
        yield Finding(True, what, fix)


def _processors(machine: Machine) -> Iterator[Finding]:
    if math.ceil(machine.usable) < machine.cores:
        what = f"{machine.usable:g} of {machine.cores} processors may be used"
        fix = "give the container or the job more, if it may have them"
        yield Finding(False, what, fix)


def _room(machine: Machine) -> Iterator[Finding]:
    if machine.disk_free < LEAST_DISK:
        what = f"{show_bytes(machine.disk_free)} of disk are free here"
        yield Finding(True, what, "free some, or keep the run elsewhere with --adapter-path")
    if machine.memory_free is not None and machine.memory_free < LEAST_MEMORY:
        what = f"{show_bytes(machine.memory_free)} of memory are free"
        yield Finding(True, what, "end other programs; jax-lora plan says what a run takes")


def _environment(machine: Machine) -> Iterator[Finding]:
    on = {name for name, value in machine.environment.items() if value.lower() in ("1", "true")}
    if "JAX_DISABLE_JIT" in on:
        yield Finding(True, "JAX_DISABLE_JIT is set: nothing is compiled", "unset JAX_DISABLE_JIT")
    if "JAX_ENABLE_X64" in on:
        what = "JAX_ENABLE_X64 is set: some numbers take twice the memory"
        yield Finding(False, what, "unset JAX_ENABLE_X64, if you did not mean it")


def _cache(cache: CompileCache) -> Iterator[Finding]:
    if cache.why_off:
        what = f"compiled programs are not kept: {cache.why_off}"
        fix = "name a folder of your own with JAX_COMPILATION_CACHE_DIR"
        yield Finding(False, what, "unset JAX_LORA_NO_CACHE" if "is set" in cache.why_off else fix)
