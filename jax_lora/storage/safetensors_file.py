"""Write a safetensors file one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

# In the order of the safetensors library: tensors with larger elements are written first.
TYPES = {
    "float64": "F64", "int64": "I64", "uint64": "U64", "float32": "F32", "int32": "I32",
    "uint32": "U32", "bfloat16": "BF16", "float16": "F16", "int16": "I16", "uint16": "U16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_ORDER = {name: place for place, name in enumerate(TYPES)}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written."""

    shape: tuple[int, ...]  # its shape
    dtype: np.dtype  # its dtype
    read: Callable[[], np.ndarray]  # computes it


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray | LazyTensor]) -> None:
    """Write tensors in place, with the metadata `format: pt`, which other libraries require.

    Only one tensor is in memory besides those that are given as arrays.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[str(tensors[name].dtype)], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        start, end = end, end + math.prod(shape) * dtype.itemsize
        stored = TYPES[str(dtype)]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(tensors[name]))
    path.chmod(0o644)


def _bytes(tensor: np.ndarray | LazyTensor) -> memoryview:
    array = tensor.read() if isinstance(tensor, LazyTensor) else tensor
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
