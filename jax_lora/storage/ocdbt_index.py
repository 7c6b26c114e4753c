"""Limit the size of an OCDBT store's index: its manifests and the nodes of its B-trees.

TensorStore decompresses them in memory without a limit. A kilobyte can expand to gigabytes.

Reference:
  https://google.github.io/tensorstore/kvstore/ocdbt/, "Storage format"; RFC 8878, section 3.1.1.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from jax_lora.storage.limits import limit, limit_hint

INDEX_LIMIT = "array_index_bytes"
_HEADER = 14  # bytes: 4 of the magic number, 8 of the length, the version, the compression
_MAGIC = re.compile(rb"\x0c\xdb(?:\x3a\x2a|\x20\xde)")  # of a manifest, of a node
ZSTD = b"\x28\xb5\x2f\xfd"
_BLOCK = 128 * 2**10  # the largest size that a block of a Zstandard frame expands to
_RAW, _RLE = 0, 1


def check_index(folder: Path) -> None:
    """Raise a `ValueError` for a store whose index may expand beyond `array_index_bytes`."""
    most, total = limit(INDEX_LIMIT), 0
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size:
            for size in _sizes(file):
                total += size
                if total > most:
                    name = file.relative_to(folder).as_posix()
                    hint = limit_hint(INDEX_LIMIT)
                    raise ValueError(f"{name}: an index of more than {most:,} bytes. {hint}")


def _sizes(file: Path) -> Iterator[int]:
    """Yield upper bounds on the expanded sizes of the manifests and nodes in a file.

    Array data between the nodes counts as a node if it looks like one.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for found in _MAGIC.finditer(data):
            start = found.start()
            length = int.from_bytes(data[start + 4 : start + 12], "little")
            if not _HEADER < length <= len(data) - start or data[start + 12] != 0:
                continue  # TensorStore refuses another length or version
            if data[start + 13] == 0:  # not compressed
                yield length
            else:
                yield from _frames(data, start + _HEADER, start + length)


def _frames(data: mmap.mmap, at: int, end: int) -> Iterator[int]:
    """Yield upper bounds on the expanded sizes of the blocks of consecutive Zstandard frames."""
    while at + 5 < end and data[at : at + 4] == ZSTD:
        checksum = 4 * (data[at + 4] >> 2 & 1)
        at, _ = frame_header(data, at)
        last = False
        while not last and at + 3 <= end:
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            yield size if kind in (_RAW, _RLE) else _BLOCK
            at += 3 + (1 if kind == _RLE else size)
        at += checksum


def frame_header(data: bytes | mmap.mmap, at: int) -> tuple[int, bytes]:
    """Return where the header of a Zstandard frame ends, and its field with the expanded size."""
    descriptor = data[at + 4]
    single = descriptor >> 5 & 1
    length = (single, 2, 4, 8)[descriptor >> 6]
    end = at + 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + length
    return end, data[end - length : end]
