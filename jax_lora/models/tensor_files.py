"""Open the safetensors files of a folder together; read their tensors one at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_lora.errors import ModelError
from jax_lora.models.folder import weight_files
from jax_lora.storage.safe_paths import contained
from jax_lora.storage.safetensors_file import TYPES

_NAMES = {stored: name for name, stored in TYPES.items()}
DTYPES = {stored: _NAMES[stored] for stored in ("F64", "F32", "F16", "BF16")}
# With the types of the tensors that describe quantized weights.
_READABLE = DTYPES | {each: _NAMES[each] for each in ("I64", "I32", "I16", "I8", "U8", "BOOL")}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, whose values, from `offset` on, are read on `read`.

    The values are copied. The pages of a mapped file would be resident memory of the process for as
    long as the file is open.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """NumPy's type; a `ModelError` if it cannot be read."""
        kind = _READABLE.get(self.dtype)
        if kind is None:
            got, expected = f"{self.name} of type {self.dtype}", " or ".join(DTYPES)
            raise ModelError(self.path, got=got, expected=expected, fix="download the file again.")
        return np.dtype(kind)

    def read(self) -> np.ndarray:
        """Read the values; raise a `ModelError` for an unknown type or a damaged file."""
        dtype, count = self.numpy_dtype, math.prod(self.shape)
        try:
            values = np.fromfile(self.path, dtype, count, offset=self.offset)
        except OSError as error:
            raise _broken(self.path, str(error)) from error
        if values.size != count:
            raise _broken(self.path, f"{self.name} ends after {values.size} of {count} values")
        return values.reshape(self.shape)


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Find every tensor of the folder, by name.

    Raises:
      ModelError: If a file is broken, or lacks a tensor that the index places there.
    """
    tensors: dict[str, Tensor] = {}
    for file_name, named in weight_files(folder).items():
        path = contained(folder, file_name, ModelError)
        try:
            with safe_open(path, framework="numpy"):  # checks the header
                found = _header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _broken(path, str(error)) from error
        tensors.update(found)
        if named is not None and named - set(found):
            missing = ", ".join(sorted(named - set(found)))
            got, fix = f"a shard without {missing}", "download both again."
            raise ModelError(
                path, got=got, expected="the tensors that the index places there", fix=fix
            )
    return tensors


def _header(path: Path) -> dict[str, Tensor]:
    """Read the header of a valid file: its length in eight bytes, and JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Tensor(
            path, name, each["dtype"], tuple(each["shape"]), 8 + length + each["data_offsets"][0]
        )
        for name, each in sorted(header.items())
    }


def _broken(path: Path, got: str) -> ModelError:
    got, fix = f"a broken file: {got}", "download the file again."
    return ModelError(path, got=got, expected="a safetensors file", fix=fix)
