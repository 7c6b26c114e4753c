"""Read the splits of a data set: a folder with one file per split, or one file to split."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from jax_lora.data.row_files import READERS, ending, is_row_file
from jax_lora.data.rows import Row, RowFile, read_rows
from jax_lora.data.text_folder import (
    cut_documents,
    cut_near,
    read_text_file,
    read_text_folder,
    text_of,
)
from jax_lora.errors import DataError
from jax_lora.storage.safe_paths import given_path

NAMES = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
PACKED = ("", ".gz")
TEXTS = (".txt", ".text", ".md")
# One in 20 examples of a single file is for validation, and one in 20 for testing.
HELD_OUT_SHARE = 20
LONG_DOCUMENT = 4000  # characters; a twentieth of it is about 50 tokens


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The splits of a data set.

    Args:
      path: The folder or file.
      splits: The examples by `"train"`, `"valid"` and `"test"`.
    """

    path: Path
    splits: dict[str, RowFile]

    def split(self, name: str) -> RowFile:
        """Return one split.

        Args:
          name: `"train"`, `"valid"` or `"test"`.

        Returns:
          Its examples.

        Raises:
          DataError: The data has no such split.
        """
        if name not in self.splits:
            have = ", ".join(self.splits) or "none"
            files = " or ".join(f"{stem}.jsonl" for stem in NAMES[name])
            raise DataError(
                str(self.path),
                got=f"the splits: {have}",
                expected=f'a "{name}" split: {files}',
                fix=f"Add {NAMES[name][0]}.jsonl to the folder.",
            )
        return self.splits[name]


def read_data(path: str | Path) -> DataSet:
    """Read and check all splits of a folder or file.

    Args:
      path: A folder with `train.jsonl` (or another format) and optionally `valid` (or `val`,
        `validation`) and `test`; or one file, with a fixed 5% of the examples for valid and 5% for
        test; or a folder of plain text or source code, or one text, split in the same way.

    Returns:
      The data set.

    Raises:
      DataError: The path does not exist, has no split, or has invalid examples.
    """
    path = given_path(path, DataError)
    if path.is_dir():
        found = {name: file for name in NAMES if (file := _file_of(path, name)) is not None}
        if found:
            return DataSet(path, {name: read_rows(file) for name, file in found.items()})
        texts = read_text_folder(path)
        if texts is None:
            raise _missing(path, "a folder without train.jsonl and without texts")
        return DataSet(path, _split(texts))
    return DataSet(path, _split(_read_file(path)))


def read_whole(path: str | Path) -> RowFile:
    """Read one file, or a folder of texts, without a split.

    Args:
      path: A file of rows; or a text or a folder of texts, which are cut into pieces.

    Returns:
      The examples.

    Raises:
      DataError: It is neither.
    """
    path = given_path(path, DataError)
    if not path.is_dir():
        return _cut(_read_file(path))
    splits = [file.name for name in NAMES if (file := _file_of(path, name)) is not None]
    if splits:
        raise DataError(
            str(path),
            got=f"a folder with {', '.join(splits)}",
            expected="one file, or a folder of texts",
            fix=f"Give one of its files, such as {path / splits[0]}.",
        )
    texts = read_text_folder(path)
    if texts is None:
        raise _missing(path, "a folder without texts")
    return _cut(texts)


def _cut(file: RowFile) -> RowFile:
    whole = any(row.kind != "document" for row in file.rows)
    return file if whole else dataclasses.replace(file, rows=tuple(cut_documents(file.rows)))


def _read_file(path: Path) -> RowFile:
    """Read rows, JSON Lines under any name, or a text."""
    if not path.is_file():
        raise _missing(path, "no such folder or file")
    if is_row_file(path):
        return read_rows(path)
    text, kind = text_of(path) or "", ending(path)
    if text.lstrip().startswith("{"):
        return read_rows(path)
    if text and kind in TEXTS:
        return read_text_file(path, text)
    got = "a file without text" if kind in TEXTS else f"a file that ends in {path.suffix!r}"
    raise _missing(path, got if path.suffix else "a file without an ending")


def _missing(path: Path, got: str) -> DataError:
    kinds = ", ".join(kind for kind in READERS if kind != ".jsonl")
    return DataError(
        str(path),
        got=got,
        expected="a folder with train.jsonl (and valid.jsonl, test.jsonl), a folder of texts, or "
        f"one file; instead of .jsonl also {kinds}, optionally gzipped; or a .txt or .md file",
        fix="Check the path of the data.",
    )


def _file_of(folder: Path, name: str) -> Path | None:
    endings = [f"{kind}{packed}" for kind in READERS for packed in PACKED]
    files = [folder / f"{stem}{each}" for stem in NAMES[name] for each in endings]
    files = [file for file in files if is_row_file(file) and file.is_file()]
    if len(files) > 1:
        raise DataError(
            str(folder),
            got=f"{' and '.join(file.name for file in files)}",
            expected=f'one file for the "{name}" split',
            fix="Move the other files out of the folder.",
        )
    return files[0] if files else None


def _split(whole: RowFile) -> dict[str, RowFile]:
    """Split a file, always in the same way, because `eval` needs the split of `train`."""
    if len(whole.rows) < HELD_OUT_SHARE and _are_long_documents(whole.rows):
        return _split_inside(whole)
    order = list(range(len(whole.rows)))
    random.Random("jax_lora split").shuffle(order)
    held_out = len(order) // HELD_OUT_SHARE
    parts = {
        "test": order[:held_out],
        "valid": order[held_out : 2 * held_out],
        "train": order[2 * held_out :],
    }
    return {
        name: dataclasses.replace(whole, rows=tuple(whole.rows[index] for index in sorted(chosen)))
        for name, chosen in parts.items()
        if chosen
    }


def _are_long_documents(rows: Sequence[Row]) -> bool:
    return any(row.kind == "document" and len(row.fields["text"]) >= LONG_DOCUMENT for row in rows)


def _split_inside(whole: RowFile) -> dict[str, RowFile]:
    """Hold out the last parts of long documents, which are too few to hold out whole ones."""
    parts: dict[str, list[Row]] = {name: [] for name in NAMES}
    for row in whole.rows:
        text = row.fields["text"]
        if len(text) < LONG_DOCUMENT:
            parts["train"].append(row)
            continue
        share = len(text) // HELD_OUT_SHARE
        valid, test = (cut_near(text, len(text) - count * share) for count in (2, 1))
        cuts = {"train": text[:valid], "valid": text[valid:test], "test": text[test:]}
        for name, part in cuts.items():
            if part.strip():
                parts[name].append(dataclasses.replace(row, fields={**row.fields, "text": part}))
    return {
        name: dataclasses.replace(whole, rows=tuple(rows)) for name, rows in parts.items() if rows
    }
