"""Check the metadata of an Orbax checkpoint against the expected arrays, before reading them.

Orbax allocates what the checkpoint states: the shape of an array, the shape of its chunks, and the
size of each compressed chunk and each node of the index. A few kilobytes can state gigabytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_lora.storage.json_files import parse_json
from jax_lora.storage.limits import limit
from jax_lora.storage.ocdbt_index import ZSTD, check_index, frame_header

_TREE = "_METADATA"  # Orbax's description of the tree, as JSON
_ARRAY = ".zarray"  # zarr's description of an array, as JSON
_MOST_CHUNKS = 2**16  # of an array, which has one for each device that saves it


def check_stored(folder: Path, template: Mapping[str, Any]) -> None:
    """Compare the sizes of stored arrays and chunks with a tree of `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: An array, a chunk or the index is larger than expected, or the checkpoint does not
        have the format that `array_store` writes.
    """
    import tensorstore  # imported on use, with Orbax

    _check_format(folder)
    check_index(folder)
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{folder.as_uri()}/"}).result()
    # Keys are looked up and never listed: nodes of the index may be shared, and then a small index
    # has more keys than memory can hold.
    for name, want in _named(template):
        described = _value(store, f"{name}/{_ARRAY}")
        if described is not None:  # Orbax reports the others
            _check_array(store, f"{name}/", parse_json(described.decode("utf-8")), want)


def _named(template: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name the leaves as Orbax does."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _check_format(folder: Path) -> None:
    with (folder / _TREE).open("rb") as file:
        data = file.read(limit("json_bytes") + 1)
    if len(data) > limit("json_bytes"):
        raise ValueError(f"{_TREE} has more than {limit('json_bytes'):,} bytes")
    tree = parse_json(data.decode("utf-8"))
    if not isinstance(tree, dict) or tree.get("use_ocdbt") is not True or tree.get("use_zarr3"):
        raise ValueError(f"{_TREE} describes another format of checkpoints")


def _check_array(store: Any, prefix: str, stored: Any, want: Any) -> None:
    """Refuse an array that is larger than expected; others can be read, and then compared."""
    shape, dtype = _field(stored, "shape"), _dtype(_field(stored, "dtype"))
    most = math.prod(want.shape) * np.dtype(want.dtype).itemsize
    if dtype is None or not _are_sizes(shape) or math.prod(shape) * dtype.itemsize > most:
        got = f"shape {str(shape)[:80]} and type {_field(stored, 'dtype')!r:.80}"
        raise ValueError(f"{prefix}{_ARRAY}: {got}, more than {most} bytes")
    chunks = _field(stored, "chunks")
    if (
        not _are_sizes(chunks)
        or 0 in chunks
        or len(chunks) != len(shape)
        or math.prod(chunks) > max(1, math.prod(shape))
    ):
        raise ValueError(f"{prefix}{_ARRAY}: chunks {str(chunks)[:80]} for shape {shape}")
    compressor = _field(stored, "compressor")
    if _field(compressor, "id") != "zstd" or _field(stored, "filters") is not None:
        raise ValueError(f"{prefix}{_ARRAY}: compression {str(compressor)[:80]}")
    size = math.prod(chunks) * dtype.itemsize
    for key in _chunk_keys(prefix, shape, chunks, stored.get("dimension_separator", ".")):
        frame = _value(store, key)
        if frame is not None and (found := _expanded_size(frame)) != size:
            got = "an unknown number of" if found is None else found
            raise ValueError(f"{prefix}: a chunk of {got} bytes instead of {size}")


def _chunk_keys(prefix: str, shape: list[int], chunks: list[int], separator: Any) -> Iterator[str]:
    """Name the chunks that a reader looks up."""
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    if math.prod(counts) > _MOST_CHUNKS or separator not in (".", "/"):
        got = f"{math.prod(counts):,} chunks, separated by {separator!r:.20}"
        raise ValueError(f"{prefix}{_ARRAY}: {got}; at most {_MOST_CHUNKS:,} are read")
    for index in itertools.product(*map(range, counts)):
        yield prefix + (separator.join(map(str, index)) or "0")


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _value(store: Any, key: str) -> bytes | None:
    found = store.read(key).result()
    return found.value if found.state == "value" else None


def _dtype(name: Any) -> np.dtype | None:
    """Read the name of a type, as zarr or as TensorStore writes it."""
    try:
        return np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        return None


def _expanded_size(frame: bytes) -> int | None:
    """Read the size that a Zstandard frame expands to; None if its header does not state it.

    Reference:
      RFC 8878, section 3.1.1.1.
    """
    if frame[:4] != ZSTD or len(frame) < 5:
        return None
    end, size = frame_header(frame, 0)
    if not size or len(frame) < end:
        return None
    return int.from_bytes(size, "little") + 256 * (len(size) == 2)
