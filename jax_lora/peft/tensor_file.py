"""Read untrusted safetensors files, and write adapter files atomically."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jax_lora.errors import AdapterFileError
from jax_lora.peft.adapter_config import CONFIG
from jax_lora.storage.atomic_writes import (
    convert_os_errors,
    is_interrupted,
    made_folder,
    recover,
    replacing_both,
)
from jax_lora.storage.locks import locked
from jax_lora.storage.pickled_weights import conversion_command, pickle_names
from jax_lora.storage.safe_paths import contained, given_path
from jax_lora.storage.safetensors_file import write_tensors

_FLOATS = {"F64", "F32", "F16", "BF16"}


def read_tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file.

    Pickle files in the folder, which can execute code, are never opened.

    Raises:
      AdapterFileError: The file is missing or damaged, or tensors have another type than
        floating-point, or NaN or Inf. The message lists all of these tensors.
    """
    path = contained(folder, name, AdapterFileError)
    if not path.is_file():
        raise _missing_file_error(folder, name)
    try:
        with safe_open(path, framework="numpy") as file:
            types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            wrong = [f"{key}: type {each}" for key, each in types.items() if each not in _FLOATS]
            found = {} if wrong else {key: file.get_tensor(key) for key in types}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        fix = "Copy the file again."
        raise _refusal(path, f"a damaged file: {error}", "a safetensors file", fix) from error
    for key, tensor in found.items():
        with np.errstate(over="ignore"):  # float64 values beyond the range of float32
            bad = int(np.sum(~np.isfinite(tensor.astype(np.float32))))
        if bad:
            wrong.append(f"{key}: {bad} elements are NaN or Inf")
    if wrong:
        raise _refusal(path, wrong, "finite floating-point values", "Use an earlier checkpoint.")
    return found


def _missing_file_error(folder: Path, name: str) -> AdapterFileError:
    if not folder.is_dir():
        return _refusal(folder, "no such folder", f"a folder with {name}", "Check the path.")
    if pickles := pickle_names(file.name for file in folder.iterdir()):
        got = f"only pickle files, {', '.join(pickles)}, which can execute code"
        command = conversion_command(folder, pickles, name)
        fix = "Save the adapter in the safetensors format, where torch is installed:"
        return _refusal(folder, got, name, f"{fix}\n    {command}")
    return _refusal(folder, f"no {name}", f"a folder with {name}", "Check the path.")


def _refusal(where: Path, got: str | list[str], expected: str, fix: str) -> AdapterFileError:
    return AdapterFileError(str(where), got=got, expected=expected, fix=fix)


def restore_files(folder: Path, weights: str) -> None:
    """Restore the earlier adapter if a process was killed while it replaced the files."""
    if is_interrupted(folder, CONFIG):
        with locked(folder, AdapterFileError), convert_os_errors(folder, AdapterFileError):
            recover(folder, weights, CONFIG)


def check_finite(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise an `AdapterFileError` if a tensor has NaN or Inf, before `folder` is written."""
    bad = [key for key, each in tensors.items() if not np.isfinite(each.astype(np.float32)).all()]
    if bad:
        got = f"NaN or Inf in {', '.join(bad)}"
        fix = "Export an adapter from before the NaN loss. Nothing was written."
        raise _refusal(folder, got, "finite values", fix)


def write_files(
    path: str | os.PathLike[str], weights: str, tensors: Mapping[str, np.ndarray], config: str
) -> None:
    """Write the two files of an adapter. Earlier files are replaced after both are complete."""
    folder = given_path(path, AdapterFileError)
    check_finite(folder, tensors)
    with made_folder(folder, AdapterFileError), locked(folder, AdapterFileError):
        with replacing_both(folder, weights, CONFIG, AdapterFileError) as (data, settings):
            write_tensors(data, tensors)
            settings.write_text(config, encoding="utf-8")
