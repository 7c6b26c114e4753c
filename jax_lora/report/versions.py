"""Record the package versions and devices of a run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from jax_lora.errors import CheckpointError
from jax_lora.storage.atomic_writes import write_file

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "grain",
)


def versions() -> dict[str, Any]:
    """Collect package versions, None for a package that is not installed, and devices."""
    import jax_lora

    return {
        "jax_lora": jax_lora.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version_of(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def write_versions(folder: Path) -> None:
    """Write versions.json to a run folder."""
    text = json.dumps(versions(), indent=2) + "\n"
    write_file(folder / "versions.json", text, CheckpointError)


def version_of(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
