import pytest

from jax_lora.data.data_folder import read_data
from jax_lora.errors import DataError


def write(path, rows):
    path.write_text("".join(f'{{"text": "row {row}"}}\n' for row in range(rows)))


@pytest.mark.parametrize("name", ["valid", "val", "validation"])
def test_a_folder_has_a_file_per_split_with_any_common_name(tmp_path, name):
    write(tmp_path / "train.jsonl", 3)
    write(tmp_path / f"{name}.jsonl", 2)
    data = read_data(tmp_path)
    assert {split: len(file.rows) for split, file in data.splits.items()} == {
        "train": 3,
        "valid": 2,
    }


def test_one_file_is_split_reproducibly_into_disjoint_splits(tmp_path):
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


def test_a_small_file_has_only_training_examples(tmp_path):
    write(tmp_path / "rows.jsonl", 10)
    assert list(read_data(tmp_path / "rows.jsonl").splits) == ["train"]


def test_a_missing_split_is_refused_with_a_list_of_the_splits(tmp_path):
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


def test_parts_of_a_few_long_texts_are_held_out(tmp_path):
    (tmp_path / "long.txt").write_text("a word " * 2000, encoding="utf-8")
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    splits = read_data(tmp_path).splits
    texts = {name: "".join(row.fields["text"] for row in splits[name].rows) for name in splits}
    assert texts["train"].endswith("short") and len(texts["valid"]) in range(650, 750)
    joined = texts["train"].removesuffix("short") + texts["valid"] + texts["test"]
    assert joined == "a word " * 2000
