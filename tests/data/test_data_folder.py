import pytest

from jax_lora.data.data_folder import read_data
from jax_lora.errors import DataError


def write(path, rows):
    path.write_text("".join(f'{{"text": "row {row}"}}\n' for row in range(rows)))


@pytest.mark.parametrize("name", ["valid", "val", "validation"])
def test_a_folder_holds_a_file_per_split_under_any_usual_name(tmp_path, name):
    write(tmp_path / "train.jsonl", 3)
    write(tmp_path / f"{name}.jsonl", 2)
    data = read_data(tmp_path)
    assert {split: len(file.rows) for split, file in data.splits.items()} == {
        "train": 3,
        "valid": 2,
    }


def test_one_file_is_cut_into_splits_that_share_no_row_and_never_change(tmp_path):
    write(tmp_path / "rows.jsonl", 100)
    data = read_data(tmp_path / "rows.jsonl")
    lines = {name: {row.line for row in file.rows} for name, file in data.splits.items()}
    assert {name: len(found) for name, found in lines.items()} == {
        "test": 5,
        "valid": 5,
        "train": 90,
    }
    assert set.union(*lines.values()) == set(range(1, 101))
    assert read_data(tmp_path / "rows.jsonl") == data


def test_a_small_file_is_all_training(tmp_path):
    write(tmp_path / "rows.jsonl", 10)
    assert list(read_data(tmp_path / "rows.jsonl").splits) == ["train"]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write(tmp_path / "train.jsonl", 3)
    with pytest.raises(
        DataError, match=r'got:      the splits: train\n.*a "test" split: test.jsonl'
    ):
        read_data(tmp_path).split("test")


def test_a_folder_without_data_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(DataError, match="a folder without train.jsonl"):
        read_data(tmp_path)
    with pytest.raises(DataError, match="no such folder or file"):
        read_data(tmp_path / "absent")
