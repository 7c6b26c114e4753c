"""Read the examples of a Parquet file in batches, with a limit on what they expand to.

A dictionary or a run-length encoding can repeat one long text in a few bytes. So the sizes of the
pages are checked first, texts are decoded as dictionaries, and repetitions count in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_lora.data.parquet_footer import check_footer
from jax_lora.data.parquet_pages import page_totals
from jax_lora.errors import DataError
from jax_lora.storage.limits import expanded_limit, limit_hint

_BATCH = 4096  # examples
# In this encoding a text repeats the start of the one before it, and a batch is decoded at once.
_INCREMENTAL, _SMALL_BATCH = "DELTA_BYTE_ARRAY", 4
_BYTES_OF_VALUE, _BYTES_OF_LISTED = 8, 100  # in memory, of a column's value, and of a list's
BYTES_OF_EXAMPLE = 300  # in memory, without its texts


def parquet_rows(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Read all examples of a Parquet file, without the values that are null.

    Raises:
      DataError: The file is damaged, or expands to more than the limit.
      ImportError: pyarrow is not installed.
    """
    import pyarrow
    import pyarrow.parquet

    budget = _Budget(path, len(content))
    try:
        reader = pyarrow.BufferReader(content)
        check_footer(content)
        metadata = pyarrow.parquet.read_metadata(reader)
        names, size = _text_columns(metadata, budget)
        if not metadata.num_rows:
            return []  # of no examples, there may be no pages
        budget.spend(BYTES_OF_EXAMPLE * metadata.num_rows)
        totals = page_totals(content, metadata)
        budget.spend(_BYTES_OF_VALUE * totals.values + _BYTES_OF_LISTED * totals.listed)
        budget.check(totals.size)
        file = pyarrow.parquet.ParquetFile(
            reader, metadata=metadata, read_dictionary=names, pre_buffer=False
        )
        return [
            {name: value for name, value in row.items() if value is not None}
            # Row groups have different dictionaries, which pyarrow does not join in nested columns.
            for group in range(metadata.num_row_groups)
            for batch in file.iter_batches(size, row_groups=[group], use_threads=False)
            for row in _rows(batch, budget)
        ]
    except (DataError, MemoryError):
        raise
    except Exception as error:  # pyarrow raises many types for damaged files
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(
            str(path),
            got=f"no Parquet file that can be read: {reason}",
            expected="a Parquet file, with text in UTF-8",
            fix="Copy the file again.",
        ) from error


class _Budget:
    """How many bytes the examples of a file may still expand to."""

    def __init__(self, path: Path, stored: int):
        self._path, self._left = path, expanded_limit(stored)

    def check(self, size: int) -> None:
        """Raise if something of this size is beyond the budget."""
        if size > self._left:
            raise DataError(
                str(self._path),
                got="a small file of examples that expand to far more than a text does",
                expected="examples that expand to about the size of the file",
                fix=limit_hint("expansion"),
            )

    def spend(self, size: int) -> None:
        """Take from the budget."""
        self.check(size)
        self._left -= size


def _text_columns(metadata: Any, budget: _Budget) -> tuple[list[str], int]:
    """Return the columns to decode as dictionaries, and how many examples to decode at once."""
    chunks: dict[int, list[Any]] = {}
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        for number in range(group.num_columns):
            chunks.setdefault(number, []).append(group.column(number))
    names, batch = [], _BATCH
    for number, parts in chunks.items():
        column = metadata.schema.column(number)
        if column.physical_type != "BYTE_ARRAY":
            continue
        if not any(_INCREMENTAL in part.encodings for part in parts):
            names.append(column.path)
            continue
        batch = _SMALL_BATCH
        if column.max_repetition_level:  # one example may have any number of texts
            budget.check(max(part.num_values * part.total_uncompressed_size for part in parts))
    return names, batch


def _rows(batch: Any, budget: _Budget) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    if len(set(names)) != len(names):
        raise ValueError("two columns with the same name")
    columns = [_values(column, budget) for column in batch.columns]
    for number in range(batch.num_rows):
        yield {name: column[number] for name, column in zip(names, columns, strict=True)}


def _values(array: Any, budget: _Budget) -> list[Any]:
    """Convert an array to Python values; equal texts of a dictionary are the same object."""
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        return _texts(array, budget)
    if types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        columns = [_values(each, budget) for each in array.flatten()]
        return [
            {name: column[number] for name, column in zip(names, columns, strict=True)}
            if valid
            else None
            for number, valid in enumerate(array.is_valid().to_pylist())
        ]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return _lists(array, budget)
    budget.spend(array.nbytes)
    return array.to_pylist()


def _texts(array: Any, budget: _Budget) -> list[Any]:
    import pyarrow.compute as pc

    used = array.indices.unique().drop_null()
    counts = {each["values"]: each["counts"] for each in array.indices.value_counts().to_pylist()}
    distinct = array.dictionary.take(used)
    try:
        lengths = pc.call_function("binary_length", [distinct]).to_pylist()
    except NotImplementedError:  # values of another type
        lengths = [8] * len(used)
    indices = used.to_pylist()
    sizes = zip(indices, lengths, strict=True)
    budget.spend(sum(counts[index] * (length or 0) for index, length in sizes))
    texts = dict(zip(indices, distinct.to_pylist(), strict=True))
    return [texts.get(index) for index in array.indices.to_pylist()]


def _lists(array: Any, budget: _Budget) -> list[Any]:
    from pyarrow import types

    offsets = array.offsets.to_pylist()
    first = offsets[0] if offsets else 0
    values = _values(array.values[first : offsets[-1] if offsets else 0], budget)
    spans = zip(offsets, offsets[1:], array.is_valid().to_pylist(), strict=False)
    lists = [values[start - first : end - first] if valid else None for start, end, valid in spans]
    if not types.is_map(array.type):
        return lists
    return [None if pairs is None else _object(pairs) for pairs in lists]


def _object(entries: list[dict[str, Any]]) -> Any:
    """Return a map as an object, or as its pairs if a key is not a text or is there twice."""
    pairs = [tuple(entry.values()) for entry in entries]
    as_object = dict(pairs) if all(isinstance(name, str) for name, _ in pairs) else {}
    return as_object if len(as_object) == len(pairs) else pairs
