"""Public figures of accelerators, by the name of a target: h100:8, or v5e:2x4.

Reference:
    NVIDIA's data sheets and architecture whitepapers (A100, Ada, Hopper, Blackwell); Google Cloud's
    documentation of TPU versions. Rates are for dense bfloat16 matmuls.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from jax_lora.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device."""

    platform: ClassVar[str]  # of JAX

    memory: float  # bytes of HBM
    bandwidth: float  # bytes per second of HBM
    flops: float  # bfloat16 matmul operations per second


@dataclasses.dataclass(frozen=True)
class Gpu(Accelerator):
    """A GPU, with what XLA asks of its description."""

    platform = "cuda"

    capability: tuple[int, int]  # CUDA compute capability, such as (9, 0)
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units per multiprocessor
    l2: int  # bytes of L2 cache
    shared: int  # bytes of shared memory per multiprocessor
    clock: float  # GHz
    threads: int = 2048  # most threads per multiprocessor


@dataclasses.dataclass(frozen=True)
class Tpu(Accelerator):
    """A TPU chip, as JAX shows it: one device."""

    platform = "tpu"

    kind: str  # the name in `TPU_ACCELERATOR_TYPE`, without its size
    # TensorCores per chip, which the size of an accelerator type counts for old versions
    cores: int = 1


_GIB = 2**30
_KIB = 2**10

ACCELERATORS: dict[str, Accelerator] = {
    "a100": Gpu(80 * _GIB, 2.039e12, 312e12, (8, 0), 108, 64, 40 << 20, 164 * _KIB, 1.41),
    "a10g": Gpu(24 * _GIB, 600e9, 70e12, (8, 6), 80, 128, 6 << 20, 100 * _KIB, 1.71, 1536),
    "l4": Gpu(24 * _GIB, 300e9, 121e12, (8, 9), 58, 128, 48 << 20, 100 * _KIB, 2.04, 1536),
    "l40s": Gpu(48 * _GIB, 864e9, 362e12, (8, 9), 142, 128, 96 << 20, 100 * _KIB, 2.52, 1536),
    "rtx4090": Gpu(24 * _GIB, 1.008e12, 165e12, (8, 9), 128, 128, 72 << 20, 100 * _KIB, 2.52, 1536),
    "h100": Gpu(80e9, 3.352e12, 989e12, (9, 0), 132, 128, 50 << 20, 228 * _KIB, 1.98),
    "h200": Gpu(141e9, 4.8e12, 989e12, (9, 0), 132, 128, 50 << 20, 228 * _KIB, 1.98),
    "v4": Tpu(32 * _GIB, 1.2e12, 275e12, "v4", 2),
    "v5e": Tpu(16 * _GIB, 819e9, 197e12, "v5litepod"),
    "v5p": Tpu(95 * _GIB, 2.765e12, 459e12, "v5p", 2),
    "v6e": Tpu(32 * _GIB, 1.638e12, 918e12, "v6e"),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of equal devices."""

    name: str  # as it was written: `h100:8`
    kind: str  # a name of `ACCELERATORS`
    shape: tuple[int, ...]  # devices along each axis: (8,), or (2, 4) for a TPU slice

    @property
    def device(self) -> Accelerator:
        """The figures of one device."""
        return ACCELERATORS[self.kind]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)


def parse_target(text: str) -> Target:
    """Read the name of a target: a GPU and its number, or a TPU and its topology.

    Raises:
      ConfigError: The name is not one of `ACCELERATORS`, or the shape is not one of integers.

    Example:
      >>> parse_target("h100:8").devices, parse_target("v5e:2x4").devices
      (8, 8)
    """
    kind, _, shape = text.partition(":")
    sizes = shape.split("x") if shape else ["1"]
    found = ACCELERATORS.get(kind)
    right = all(size.isascii() and size.isdecimal() and int(size) > 0 for size in sizes)
    if found is None or not right or (isinstance(found, Gpu) and len(sizes) > 1):
        names = ", ".join(ACCELERATORS)
        raise ConfigError(
            "topology",
            got=repr(text),
            expected=f"NAME:NUMBER or, for a TPU, NAME:TOPOLOGY; NAME is one of {names}",
            fix="Write for example h100:1, h100:8, v5e:2x4, or v5p:1x1x1.",
        )
    return Target(text, kind, tuple(map(int, sizes)))


def gpu_description(gpu: Gpu, name: str) -> str:
    """Describe a GPU in the text format of XLA's `GpuTargetConfig`."""
    major, minor = gpu.capability
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {gpu.bandwidth:.0f}
  device_memory_size: {gpu.memory:.0f}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock}
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  device_vendor: "NVIDIA Corporation"
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
