"""Markdown tables, and sections of documents to write them to."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence

import jax


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with aligned columns.

    Example:
      >>> print(table(["form", "GF"], [["full", "77.31"]]))
      | form |    GF |
      |------|------:|
      | full | 77.31 |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), f"|{'|'.join(rules)}|", *map(line, rows)])


def machine() -> str:
    """Describe the machine and versions."""
    device = jax.devices()[0]
    kind = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    return f"jax {jax.__version__}, Python {platform.python_version()}, {kind}"


def command(module: str) -> str:
    """Return the current command without --markdown."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--markdown":
            words.append(word)
        skip = word == "--markdown" and not skip
    return shlex.join(["python", "-m", module, *words])


def compilers(tpu: bool) -> str:
    """Return the versions of JAX, which brings the compiler for GPUs, and of that for TPUs."""
    text = f"jax {jax.__version__}"
    return f"{text}, libtpu {importlib.metadata.version('libtpu')}" if tpu else text


def write_section(document: pathlib.Path, name: str, text: str) -> None:
    """Replace a marked section of a document, or append it.

    Args:
      document: A Markdown file; created if it is missing.
      name: Name of the section.
      text: The new text.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    old = document.read_text(encoding="utf-8") if document.exists() else ""
    if begin in old and end in old:
        before, rest = old.split(begin, 1)
        new = before + section + rest.split(end, 1)[1]
    else:
        new = f"{old.rstrip()}\n\n{section}\n".lstrip()
    document.write_text(new, encoding="utf-8")
