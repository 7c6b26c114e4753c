"""The tensors of a folder's safetensors files, opened together and read one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_lora.errors import ModelError, format_error
from jax_lora.models.folder import member, weight_files

__all__ = ["DTYPES", "Tensor", "open_tensors"]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensor:
    """A tensor in an open file: its shape and dtype at once, its numbers when asked."""

    def __init__(self, file: Any, name: str):
        """Look a tensor up."""
        piece = file.get_slice(name)
        self.shape, self.dtype = tuple(piece.get_shape()), piece.get_dtype()
        self._file, self._name = file, name

    def read(self) -> np.ndarray:
        """Read the numbers."""
        return self._file.get_tensor(self._name)


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Tensor]:
    """Every tensor of the folder by name; files stay open as long as `stack`.

    Raises:
      ModelError: if a file is broken, or lacks a tensor that the index places there.
    """
    tensors: dict[str, Tensor] = {}
    for file_name, named in weight_files(folder).items():
        path = member(folder, file_name)
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            found = set(file.keys())
            tensors.update({name: Tensor(file, name) for name in sorted(found)})
        except (SafetensorError, OSError) as error:
            raise ModelError(
                format_error(
                    str(path),
                    got=f"a broken file: {error}",
                    expected="a safetensors file",
                    fix="fetch the file again.",
                )
            ) from error
        if named is not None and named - found:
            raise ModelError(
                format_error(
                    str(path),
                    got="a shard without " + ", ".join(sorted(named - found)),
                    expected="the tensors that the index places there",
                    fix="fetch the shard and the index again.",
                )
            )
    return tensors
