import pytest

from jax_lora.data.columns import parse_columns, renaming
from jax_lora.data.rows import read_rows
from jax_lora.errors import ConfigError, DataError


def test_columns_are_renamed_and_a_missing_one_is_an_error(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("query;reply;prompt\n2 + 3; 5;unused\n", encoding="utf-8")
    with renaming("prompt=query,completion=reply"), renaming(None):
        (row,) = read_rows(path).rows
    assert row.fields == {"prompt": "2 + 3", "completion": " 5"}
    with renaming("prompt=q"), pytest.raises(DataError, match='no column "q"'):
        read_rows(path)


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=a", "prompt=a,prompt=b"])
def test_columns_that_are_not_pairs_are_refused(text):
    with pytest.raises(ConfigError, match="FIELD=COLUMN"):
        parse_columns(text)
