"""Bound the index of an OCDBT store: its manifests, and the nodes of its B-trees.

TensorStore expands them in memory, whatever size they have. A kilobyte can expand to gigabytes.

Reference:
  https://google.github.io/tensorstore/kvstore/ocdbt/, "Storage format"; RFC 8878, section 3.1.1.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from jax_lora.storage.limits import limit, raise_hint

SIZE = "array_index_bytes"
_HEAD = 14  # bytes: a magic number, the length, a version, the kind of compression
_MAGIC = re.compile(rb"\x0c\xdb(?:\x3a\x2a|\x20\xde)")  # of a manifest, of a node
_ZSTD = b"\x28\xb5\x2f\xfd"
_BLOCK = 128 * 2**10  # the largest size that a block of a Zstandard frame expands to
_RAW, _RLE = 0, 1


def check_index(folder: Path) -> None:
    """Refuse an index that may expand to more than the limit `array_index_bytes`.

    Args:
      folder: The store.

    Raises:
      ValueError: It may.
    """
    most, total = limit(SIZE), 0
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size:
            for size in _sizes(file):
                total += size
                if total > most:
                    name = file.relative_to(folder).as_posix()
                    raise ValueError(
                        f"{name}: an index of more than {most:,} bytes. {raise_hint(SIZE)}"
                    )


def _sizes(file: Path) -> Iterator[int]:
    """Yield bounds on the expanded sizes of the manifests and nodes in a file.

    Values lie between the nodes. Those that look like a node count as one.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for found in _MAGIC.finditer(data):
            start = found.start()
            length = int.from_bytes(data[start + 4 : start + 12], "little")
            version, compression = data[start + 12 : start + _HEAD] or (1, 0)
            if version != 0 or not _HEAD < length <= len(data) - start:
                continue  # TensorStore refuses it
            if compression == 0:
                yield length
            else:
                yield from _frames(data, start + _HEAD, start + length)


def _frames(data: mmap.mmap, at: int, end: int) -> Iterator[int]:
    """Yield bounds on the expanded sizes of Zstandard frames in a row."""
    while at + 5 < end and data[at : at + 4] == _ZSTD:
        descriptor = data[at + 4]
        single, checksum = descriptor & 32, 4 * (descriptor >> 2 & 1)
        size_bytes = (int(bool(single)), 2, 4, 8)[descriptor >> 6]
        at += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3] + size_bytes
        last = False
        while not last and at + 3 <= end:
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            yield size if kind in (_RAW, _RLE) else _BLOCK
            at += 3 + (1 if kind == _RLE else size)
        at += checksum
