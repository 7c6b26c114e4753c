"""Open the safetensors files of a folder together; read their tensors one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_lora.errors import ModelError, format_error
from jax_lora.models.folder import member, weight_files
from jax_lora.models.model_errors import raise_model_error

__all__ = ["DTYPES", "Tensor", "open_tensors"]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensor:
    """A tensor in an open file: shape and dtype, and the values on `read`."""

    def __init__(self, file: Any, name: str):
        """Look up a tensor; its values are not read yet."""
        piece = file.get_slice(name)
        self.shape, self.dtype = tuple(piece.get_shape()), piece.get_dtype()
        self._file, self._name = file, name

    def read(self) -> np.ndarray:
        """Read the values.

        Raises:
          ModelError: NumPy has no such type, or the file is damaged.
        """
        try:
            return self._file.get_tensor(self._name)
        except Exception as error:  # the library raises many types
            got = f"{self._name} of type {self.dtype}: {type(error).__name__}: {error}"
            expected = " or ".join(DTYPES)
            raise_model_error("a safetensors file", got, expected, "download the file again.")


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Tensor]:
    """Open every tensor of the folder, by name; files stay open as long as `stack`.

    Raises:
      ModelError: If a file is broken, or lacks a tensor that the index places there.
    """
    tensors: dict[str, Tensor] = {}
    for file_name, named in weight_files(folder).items():
        path = member(folder, file_name)
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            found = set(file.keys())
            tensors.update({name: Tensor(file, name) for name in sorted(found)})
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                format_error(
                    str(path),
                    got=f"a broken file: {error}",
                    expected="a safetensors file",
                    fix="download the file again.",
                )
            ) from error
        if named is not None and named - found:
            got, fix = "a shard without " + ", ".join(sorted(named - found)), "download both again."
            raise_model_error(path, got, "the tensors that the index places there", fix)
    return tensors
