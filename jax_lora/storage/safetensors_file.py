"""Write a safetensors file, with the errors of the file system as `OSError`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors by name, marked as those of PyTorch, which other libraries require.

    Args:
      path: The file, which is written in place.
      tensors: Arrays by name.

    Raises:
      OSError: Writing fails; the writer has another type for it, which hides the cause.
    """
    contiguous = {name: np.ascontiguousarray(each) for name, each in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o644)  # safetensors creates a file with mode 0600
