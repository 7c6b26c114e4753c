"""Read untrusted safetensors files, and write adapter files atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jax_lora.errors import AdapterFileError, format_error
from jax_lora.storage.atomic_writes import (
    explained,
    is_interrupted,
    made_folder,
    recover,
    replacing_both,
)
from jax_lora.storage.locks import locked
from jax_lora.storage.pickled_weights import conversion_command, pickle_names
from jax_lora.storage.safe_paths import contained
from jax_lora.storage.safetensors_file import write_tensors

_FLOATS = {"F64", "F32", "F16", "BF16"}


def read_tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file.

    No other file in the folder is opened; in particular no pickle file, which could execute code.

    Args:
      folder: The folder.
      name: Name of the file.

    Returns:
      Arrays by name.

    Raises:
      AdapterFileError: The file is missing or damaged, or tensors are not floating-point or have
        NaN or Inf. One message lists all such tensors.
    """
    path = contained(folder, name, AdapterFileError)
    if not path.is_file():
        raise _absent(folder, name)
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            wrong = [f"{k}: type {v}" for k, v in kinds.items() if v not in _FLOATS]
            found = {} if wrong else {key: file.get_tensor(key) for key in kinds}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        fix = "Copy the file again."
        raise _refusal(path, f"a damaged file: {error}", "a safetensors file", fix) from error
    for key, tensor in found.items():
        with np.errstate(over="ignore"):  # a float64 may be beyond the range of float32
            bad = int(np.sum(~np.isfinite(tensor.astype(np.float32))))
        if bad:
            wrong.append(f"{key}: {bad} elements are NaN or Inf")
    if wrong:
        raise _refusal(path, wrong, "finite floating-point values", "Use an earlier checkpoint.")
    return found


def _absent(folder: Path, name: str) -> AdapterFileError:
    if not folder.is_dir():
        return _refusal(folder, "no such folder", f"a folder with {name}", "Check the path.")
    if pickles := pickle_names(file.name for file in folder.iterdir()):
        got = f"only pickle files, {', '.join(pickles)}, which can execute code"
        command = conversion_command(folder, pickles, name)
        fix = (
            f"Save the adapter in the safetensors format, where torch is installed:\n    {command}"
        )
        return _refusal(folder, got, name, fix)
    return _refusal(folder, f"no {name}", f"a folder with {name}", "Check the path.")


def _refusal(where: Path, got: str | list[str], expected: str, fix: str) -> AdapterFileError:
    return AdapterFileError(format_error(str(where), got=got, expected=expected, fix=fix))


def restore_files(folder: Path, weights: str, config: str) -> None:
    """Bring back the adapter that a killed process was about to replace.

    Args:
      folder: The folder.
      weights: Name of the file of tensors.
      config: Name of the configuration file.

    Raises:
      AdapterFileError: The folder cannot be written, or has another writer.
    """
    if is_interrupted(folder, config):
        with locked(folder, AdapterFileError), explained(folder, AdapterFileError):
            recover(folder, weights, config)


def check_finite(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise an `AdapterFileError` if a tensor has NaN or Inf, before `folder` is written."""
    bad = [key for key, each in tensors.items() if not np.isfinite(each.astype(np.float32)).all()]
    if bad:
        got = f"NaN or Inf in {', '.join(bad)}"
        fix = "Export an adapter from before the NaN loss. Nothing was written."
        raise _refusal(folder, got, "finite values", fix)


def write_files(
    folder: Path, weights: str, tensors: Mapping[str, np.ndarray], config: str, text: str
) -> None:
    """Write the two files of an adapter; existing files are replaced when both are complete.

    Args:
      folder: The folder, created if necessary.
      weights: Name of the file of tensors.
      tensors: Arrays by name.
      config: Name of the configuration file.
      text: The configuration.

    Raises:
      AdapterFileError: An array has NaN or Inf, or the folder cannot be written or has another
        writer; then the earlier files are unchanged.
    """
    check_finite(folder, tensors)
    with made_folder(folder, AdapterFileError), locked(folder, AdapterFileError):
        with replacing_both(folder, weights, config, AdapterFileError) as (data, settings):
            write_tensors(data, tensors)
            settings.write_text(text, encoding="utf-8")
