"""The devices of a target that is not on this machine, for which XLA compiles ahead of time."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from jax_lora.errors import ConfigError, install_command
from jax_lora.plan.accelerators import Gpu, Target, Tpu, gpu_description


def compiler_options(target: Target) -> dict[str, str]:
    """Return the XLA options for a compilation without the device."""
    # Autotuning would run kernels on the device; without it, Triton's matmuls cannot be chosen.
    gpu = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}
    return gpu if isinstance(target.device, Gpu) else {}


def abstract_devices(target: Target) -> Sequence[Any]:
    """Return devices of JAX that functions can be compiled for, but not run on.

    Raises:
      ConfigError: The compiler of the platform is not installed, or does not support the shape.
    """
    device = target.device
    gpu = isinstance(device, Gpu)
    extra, package = ("aot-cuda", "jax_cuda13_plugin") if gpu else ("aot-tpu", "libtpu")
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"topology {target.name}",
            got=f"no package {package}, which compiles for it",
            expected="an environment with the compiler; the device is not needed",
            fix=install_command(extra),
        )
    from jax.experimental import topologies  # imported on use, as it starts no backend

    try:
        if isinstance(device, Gpu):
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=target.kind,
                topology=f"1x1x{target.devices}",
                target_config=gpu_description(device, target.kind.upper()),
            )
        else:
            assert isinstance(device, Tpu)
            _set_tpu_environment(device, target)
            shape = "x".join(map(str, target.shape))
            # A host has 2x2 chips, or the whole of a smaller shape.
            host = (*(min(2, chips) for chips in target.shape[:2]), 1)
            found = topologies.get_topology_desc(
                f"{target.kind}:{shape}", platform="tpu", chips_per_host_bounds=host
            )
    except Exception as error:  # the type depends on the plugin
        raise ConfigError(
            f"topology {target.name}",
            got=f"{type(error).__name__}: {error}",
            expected="a shape that the compiler supports",
            fix="Write for example h100:8, v5e:2x4, v5p:2x2x1, or v6e:2x2.",
        ) from error
    return found.devices


def _set_tpu_environment(device: Tpu, target: Target) -> None:
    """Keep libtpu from looking for a TPU, and from claiming the machine for one process."""
    import libtpu  # type: ignore[import-not-found]

    defaults = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{device.kind}-{max(target.devices, 4) * device.cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
