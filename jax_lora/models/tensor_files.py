"""Open the safetensors files of a folder together; read their tensors one at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_lora.errors import ModelError, format_error
from jax_lora.models.folder import member, weight_files
from jax_lora.models.model_errors import raise_model_error

__all__ = ["DTYPES", "Tensor", "open_tensors"]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Types of the tensors that describe quantized weights.
_INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
_READABLE = DTYPES | _INTEGERS | {"BOOL": "bool"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, whose values are read on `read`.

    The values are copied. The pages of a mapped file would be resident memory of the process for as
    long as the file is open.

    Args:
      path: The file.
      name: Name of the tensor.
      dtype: Its type, in the format's notation.
      shape: Its shape.
      offset: Position of its values in the file, in bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """Return NumPy's name of the type.

        Raises:
          ModelError: The type cannot be read.
        """
        kind = _READABLE.get(self.dtype)
        if kind is None:
            got, expected = f"{self.name} of type {self.dtype}", " or ".join(DTYPES)
            raise_model_error(self.path, got, expected, "download the file again.")
        return np.dtype(kind)

    def read(self) -> np.ndarray:
        """Read the values.

        Raises:
          ModelError: The type cannot be read, or the file is damaged.
        """
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
        path = member(folder, file_name)
        try:
            with safe_open(path, framework="numpy"):  # checks the header
                found = _header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _broken(path, str(error)) from error
        tensors.update(found)
        if named is not None and named - set(found):
            missing = ", ".join(sorted(named - set(found)))
            got, fix = f"a shard without {missing}", "download both again."
            raise_model_error(path, got, "the tensors that the index places there", fix)
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
    return ModelError(
        format_error(
            str(path),
            got=f"a broken file: {got}",
            expected="a safetensors file",
            fix="download the file again.",
        )
    )
