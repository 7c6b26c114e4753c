"""Read plain text: a file, or a folder of texts or source code, with one document per file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from jax_lora.data.rows import Row, RowFile

LONGEST_PIECE = 4000  # characters; about 1,000 tokens
LARGEST_TEXT = 2**24  # bytes; larger files are probably data


def read_text_folder(folder: Path) -> RowFile | None:
    """Read the text files in a folder and its subfolders as documents, in the order of the paths.

    Hidden files and folders, links, binaries and empty files are skipped. Without a text, return
    None.
    """
    rows, skipped = [], 0
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        text = None if path.is_symlink() else text_of(path)
        if text is None:
            skipped += 1
            continue
        rows.append(_document(len(rows) + 1, text, "/".join(parts)))
    return _row_file(folder, rows, skipped) if rows else None


def read_text_file(path: Path, text: str) -> RowFile:
    """Return a text file as one document."""
    return _row_file(path, [_document(1, text, path.name)])


def _document(number: int, text: str, name: str) -> Row:
    return Row(number, "document", {"text": text, "file": name})


def _row_file(path: Path, rows: list[Row], skipped: int = 0) -> RowFile:
    digest = hashlib.sha256()
    for row in rows:
        name, text = row.fields["file"], row.fields["text"]
        digest.update(f"{name}\0{len(text)}\0{text}".encode("utf-8", "surrogateescape"))
    return RowFile(path, tuple(rows), len(rows), 0, digest.hexdigest(), skipped)


def cut_documents(rows: Iterable[Row], longest: int = LONGEST_PIECE) -> Iterator[Row]:
    """Cut documents into pieces of at most `longest` characters, at the end of a line or word."""
    for row in rows:
        text, start = row.fields["text"], 0
        while start < len(text):
            end = cut_near(text, start + longest, start)
            yield dataclasses.replace(row, fields={**row.fields, "text": text[start:end]})
            start = end


def cut_near(text: str, at: int, start: int = 0) -> int:
    """Return the last end of a line, else of a word, in the second half of `text[start:at]`."""
    if at >= len(text):
        return len(text)
    ends = (text.rfind(end, (start + at) // 2, at) + 1 for end in ("\n", " "))
    return next((end for end in ends if end), at)


def text_of(path: Path) -> str | None:
    """Return the text of a file; None if it has none, is binary, or is too large."""
    try:
        if path.stat().st_size > LARGEST_TEXT:
            return None
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    if b"\0" in content:
        return None
    return text if text.strip() else None
