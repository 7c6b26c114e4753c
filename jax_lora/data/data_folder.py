"""Finds the splits of a data set: a folder with a file per split, or one file that is split."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from jax_lora.data.row_files import READERS, is_row_file
from jax_lora.data.rows import RowFile, read_rows
from jax_lora.data.text_folder import read_text_folder
from jax_lora.errors import DataError, format_error

NAMES = {
    "train": ("train",),
    "valid": ("valid", "val", "validation"),
    "test": ("test",),
}
PACKED = ("", ".gz")
# A single file gives a twentieth of its rows to validation and as many to the test.
HELD_OUT_SHARE = 20


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Rows of the splits that there are.

    Args:
      path: The folder or the file.
      splits: Rows by `"train"`, `"valid"` and `"test"`.
    """

    path: Path
    splits: dict[str, RowFile]

    def split(self, name: str) -> RowFile:
        """Return one split.

        Args:
          name: `"train"`, `"valid"` or `"test"`.

        Returns:
          Its rows.

        Raises:
          DataError: The data has no such split.
        """
        if name not in self.splits:
            have = ", ".join(self.splits) or "none"
            files = " or ".join(f"{stem}.jsonl" for stem in NAMES[name])
            raise DataError(
                format_error(
                    str(self.path),
                    got=f"the splits: {have}",
                    expected=f'a "{name}" split: {files}',
                    fix=f"Put {NAMES[name][0]}.jsonl there.",
                )
            )
        return self.splits[name]


def read_data(path: str | Path) -> DataSet:
    """Read every split that a folder or a file holds, and check all rows.

    Args:
      path: A folder with `train.jsonl` (or another kind of file) and perhaps `valid` (or `val`,
        `validation`) and `test`; or one file, of which a fixed twentieth each becomes valid and
        test; or a folder of plain text or source code, which is split in the same way.

    Returns:
      The data set.

    Raises:
      DataError: There is no such folder or file, it holds no split, or rows are wrong.
    """
    path = Path(path)
    if path.is_dir():
        found = {name: file for name in NAMES if (file := _file_of(path, name)) is not None}
        if found:
            return DataSet(path, {name: read_rows(file) for name, file in found.items()})
        texts = read_text_folder(path)
        if texts is None:
            raise DataError(_missing(path, "a folder without train.jsonl, and without texts"))
        return DataSet(path, _cut(texts))
    if path.is_file():
        if not is_row_file(path):
            raise DataError(_missing(path, f"a file that ends in {path.suffix!r}"))
        return DataSet(path, _cut(read_rows(path)))
    raise DataError(_missing(path, "no such folder or file"))


def _missing(path: Path, got: str) -> str:
    kinds = ", ".join(READERS)
    return format_error(
        str(path),
        got=got,
        expected="a folder with train.jsonl (and valid.jsonl, test.jsonl), a folder of texts, or "
        f"one file; in place of .jsonl: {kinds}, gzipped or not",
        fix="Check the path of the data.",
    )


def _file_of(folder: Path, name: str) -> Path | None:
    names = [
        f"{stem}{kind}{packed}" for stem in NAMES[name] for kind in READERS for packed in PACKED
    ]
    files = [folder / each for each in names if is_row_file(folder / each)]
    files = [file for file in files if file.is_file()]
    if len(files) > 1:
        raise DataError(
            format_error(
                str(folder),
                got=f"{' and '.join(file.name for file in files)}",
                expected=f'one file for the "{name}" split',
                fix="Move the others away.",
            )
        )
    return files[0] if files else None


def _cut(whole: RowFile) -> dict[str, RowFile]:
    """Split one file, always alike: `eval` must find the rows that `train` held out."""
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
