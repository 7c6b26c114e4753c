"""A Parquet file cannot expand to more than a limit, and gives the values that pyarrow gives."""

import contextlib
import io

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from jax_lora.data.parquet_pages import page_totals  # noqa: E402
from jax_lora.data.parquet_rows import parquet_rows  # noqa: E402
from jax_lora.data.rows import read_rows  # noqa: E402
from jax_lora.errors import DataError  # noqa: E402
from jax_lora.storage.limits import limit_hint  # noqa: E402

TURNS = [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": None}]
TABLE = pa.table(
    {
        "messages": [TURNS, TURNS, None, [], TURNS],
        "prompt": ["x", None, "y", "x", "é"],
        "number": [1, 2, 3, 4, None],
        "map": pa.array([[("a", "b")]] * 4 + [None], pa.map_(pa.string(), pa.string())),
        "lists": [[["a"], ["b", "c"]]] * 5,
        "object": [{"k": 1}, None, {"k": 2}, {"k": None}, {"k": 3}],
        "codes": pa.array(["a", "b", None, "a", "a"]).dictionary_encode(),
    }
)


def _pyarrow_rows():
    return TABLE.to_pylist(maps_as_pydicts="strict")


def written(table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def bomb(rows, text):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    return written(pa.table({"text": column}), compression="zstd")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False},
        {"data_page_version": "2.0"},
        {"row_group_size": 2, "compression": "zstd"},
        {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
        {"dictionary_pagesize_limit": 10, "data_page_size": 20, "write_batch_size": 2},
    ],
    ids=str,
)
def test_values_are_those_of_pyarrow(tmp_path, options):
    rows = [{k: v for k, v in row.items() if v is not None} for row in _pyarrow_rows()]
    assert parquet_rows(tmp_path, written(TABLE, **options)) == rows


def test_a_map_is_an_object_unless_a_key_is_there_twice(tmp_path):
    maps = pa.array([[("a", "b")], [], [("a", "b"), ("a", "c")]], pa.map_(pa.string(), pa.string()))
    rows = parquet_rows(tmp_path, written(pa.table({"map": maps})))
    assert [row["map"] for row in rows] == [{"a": "b"}, {}, [("a", "b"), ("a", "c")]]


def test_a_file_without_examples_is_not_called_damaged(tmp_path):
    file = tmp_path / "train.parquet"
    file.write_bytes(written(pa.table({"text": pa.array([], pa.string())})))
    with pytest.raises(DataError, match="at least one"):
        read_rows(file)


def test_a_dictionary_that_repeats_one_text_is_refused_early(tmp_path):
    file = tmp_path / "train.parquet"
    file.write_bytes(bomb(300_000, "q" * 5000))
    assert file.stat().st_size < 5000
    with pytest.raises(DataError, match="expand to far more") as caught:
        read_rows(file)
    assert str(caught.value).endswith(limit_hint("expansion"))


def test_a_user_can_raise_the_limit(tmp_path, monkeypatch):
    file = tmp_path / "train.parquet"
    file.write_bytes(bomb(2000, "q" * 5000))
    monkeypatch.setenv("JAX_LORA_LIMITS", "expanded_bytes=1000")
    with pytest.raises(DataError):
        read_rows(file)
    monkeypatch.setenv("JAX_LORA_LIMITS", "expanded_bytes=20000000")
    assert len(read_rows(file).rows) == 2000


LONG = pa.ListArray.from_arrays([0, 17_000_000], pa.nulls(17_000_000, pa.int8()))


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"text": pa.nulls(3_000_000, pa.string())}),  # run-length encoded
        pa.table(
            {
                "text": ["a"],
                "n": LONG,
            }
        ),  # one example of many values
        pa.table({"text": [["q" * 100_000] * 1000]}),
    ],
    ids=["many examples", "a long list", "a list that repeats a text"],
)
def test_other_repetitions_are_refused(tmp_path, table):
    content = written(table, compression="zstd")
    assert len(content) < 200_000
    with pytest.raises(DataError, match="expand to far more"):
        parquet_rows(tmp_path, content)


def test_the_headers_of_pages_are_added_up():
    content = written(TABLE, compression="none", row_group_size=2)
    metadata = pq.read_metadata(io.BytesIO(content))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    totals = page_totals(content, metadata)
    assert 0 < totals.listed < totals.values == sum(column.num_values for column in columns)
    # Without compression the chunks hold the pages and their headers.
    assert 0 < totals.size < sum(column.total_compressed_size for column in columns)


def test_text_that_is_not_utf8_is_a_data_error(tmp_path):
    table = pa.table({"text": ["zzzz"] * 3})
    content = written(table, compression="none", use_dictionary=False, write_statistics=False)
    with pytest.raises(DataError, match="UnicodeDecodeError"):
        parquet_rows(tmp_path, content.replace(b"zzzz", b"z\xed\xa0z", 1))


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    with pytest.raises(DataError, match="two columns with the same name"):
        parquet_rows(tmp_path, written(table))


def test_a_footer_that_makes_pyarrow_abort_is_an_error(tmp_path):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a text"] * 9}), file)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[-8:-4], "little")
    for at in range(len(content) - 8 - length, len(content) - 8, 19):
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        file.write_bytes(damaged)
        with contextlib.suppress(DataError):
            read_rows(file)
