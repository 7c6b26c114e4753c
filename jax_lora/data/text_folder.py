"""A folder of plain text or source code: a document a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jax_lora.data.rows import Row, RowFile

LARGEST_TEXT = 2**24  # bytes; larger files are data and no text that a person wrote


def read_text_folder(folder: Path) -> RowFile | None:
    """Read every text below a folder.

    Args:
      folder: The folder. Hidden files and folders, links, binaries and empty files are skipped.

    Returns:
      A document a file, by path; None if there is not one text.
    """
    rows, skipped, digest = [], 0, hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        text = None if path.is_symlink() else _text_of(path)
        if text is None:
            skipped += 1
            continue
        name = "/".join(parts)
        digest.update(f"{name}\0{len(text)}\0{text}".encode())
        rows.append(Row(len(rows) + 1, "document", {"text": text, "file": name}))
    if not rows:
        return None
    return RowFile(folder, tuple(rows), len(rows), 0, digest.hexdigest(), skipped)


def _text_of(path: Path) -> str | None:
    if path.stat().st_size > LARGEST_TEXT:
        return None
    content = path.read_bytes()
    if b"\0" in content:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None
