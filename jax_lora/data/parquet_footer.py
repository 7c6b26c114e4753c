"""Check the footer of a Parquet file in a child process.

With a damaged footer, pyarrow may abort the whole process: some of its accessors let C++ exceptions
through. A child therefore reads everything in the footer first, in a fraction of a second.
"""

from __future__ import annotations

import functools
import subprocess
import sys

_SECONDS = 60
_MOST_BYTES = 64 * 2**20  # more than the footer of a file with a million columns
_PROGRAM = """
import sys
import pyarrow
import pyarrow.parquet
metadata = pyarrow.parquet.read_metadata(pyarrow.BufferReader(sys.stdin.buffer.read()))
metadata.schema.to_arrow_schema()
for group in map(metadata.row_group, range(metadata.num_row_groups)):
    for number in range(group.num_columns):
        group.column(number).to_dict()
        metadata.schema.column(number).physical_type
"""


def check_footer(content: bytes) -> None:
    """Check that pyarrow can read the footer of a file, given its whole content.

    Raises:
      ValueError: The footer is damaged, or too large.
    """
    length = int.from_bytes(content[-8:-4], "little")
    if content[-4:] != b"PAR1" or length + 8 > len(content):
        raise ValueError("no footer")
    if length > _MOST_BYTES:
        raise ValueError(f"a footer of {length:,} bytes")
    if problem := _problem(content[len(content) - 8 - length :]):
        raise ValueError(f"a damaged footer: {problem}")


@functools.lru_cache(maxsize=16)
def _problem(footer: bytes) -> str:
    """Return what the child says, or an empty string."""
    child = subprocess.run(
        [sys.executable, "-I", "-c", _PROGRAM],
        input=b"PAR1" + footer,
        capture_output=True,
        timeout=_SECONDS,
        check=False,
    )
    if child.returncode == 0:
        return ""
    lines = child.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {child.returncode}"
