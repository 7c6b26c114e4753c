"""Write a GGUF file: metadata, and float32 tensors.

The layout, version 3, all integers little-endian:

    magic, version, number of tensors, number of metadata entries
    for each metadata entry: name, type, value
    for each tensor: name, number of axes, axes with the fastest first, type, offset in the data
    zeros up to a multiple of the alignment, then the data; every tensor begins at such a multiple

Reference:
  The specification of GGUF in the repository of ggml, `docs/gguf.md`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_VERSION = 3
_ALIGNMENT = 32  # the default of the format
_FLOAT32, _STRING = 6, 8  # types of metadata
_F32 = 0  # type of a tensor


def write_gguf(
    path: Path, metadata: Mapping[str, str | float], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write a GGUF file, in place; numbers and tensors are stored as float32.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_gguf(Path(folder) / "a", {"general.type": "adapter"}, {"w": np.ones((2, 3))})
      ...     (Path(folder) / "a").read_bytes()[:4]
      b'GGUF'
    """
    header = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    header += [_text(name) + _value(value) for name, value in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += [_text(name), axes, struct.pack("<IQ", _F32, offset)]
        offset += _padded(4 * tensor.size)
    start = b"".join(header)
    with path.open("wb") as file:
        file.write(start.ljust(_padded(len(start)), b"\0"))
        for tensor in tensors.values():
            data = np.ascontiguousarray(tensor, "<f4").tobytes()
            file.write(data.ljust(_padded(len(data)), b"\0"))


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: str | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    return struct.pack("<If", _FLOAT32, value)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
