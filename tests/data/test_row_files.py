import gzip
import json
import sys

import pytest

from jax_lora.data.data_folder import read_data, read_whole
from jax_lora.data.rows import read_rows
from jax_lora.errors import DataError
from jax_lora.storage.limits import limit_hint

ROWS = [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "é", "completion": "f"}]


def csv_text(separator=","):
    cells = [[f'"{value}"' for value in row.values()] for row in ROWS]
    return "".join(separator.join(line) + "\n" for line in [list(ROWS[0]), *cells])


CONTENTS = {
    "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "train.json": json.dumps(ROWS),
    "wrapped.json": json.dumps({"data": ROWS}),
    "train.csv": csv_text(),
    "train.tsv": csv_text("\t"),
}

# With no time in it: the bytes name a test, and every worker must collect the same names.
CUT_OFF = gzip.compress(b'{"text": "a"}' * 50, mtime=0)[:-9]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, packed):
    content = CONTENTS[name].encode()
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else b"\xef\xbb\xbf" + content)
    found = [row.fields for row in read_rows(path).rows]
    assert [{key: row[key] for key in ROWS[0]} for row in found] == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "train.parquet")
    assert [row.fields for row in read_rows(tmp_path / "train.parquet").rows] == ROWS


def test_a_file_has_another_digest_once_a_byte_changes(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(CONTENTS["train.jsonl"])
    before = read_rows(path).digest
    path.write_text(CONTENTS["train.jsonl"].replace("f", "g"))
    assert read_rows(path).digest != before


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(CONTENTS["train.jsonl"])
    assert [row.fields for row in read_rows(path).rows] == ROWS


@pytest.mark.parametrize("name", ["train.jsonl", "train.ndjson", "train.jsonlines"])
def test_a_list_under_the_name_of_json_lines_is_read(tmp_path, name):
    for content in (CONTENTS["train.json"], CONTENTS["train.jsonl"]):
        (tmp_path / name).write_text(content)
        assert [row.fields for row in read_rows(tmp_path / name).rows] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", gzip.compress(b"{}", mtime=0), "Rename it to train.jsonl.gz"),
        ("train.json", b"", "no row in 0 lines"),
        ("train.json", b'[{"text": "a"}', "the file seems to be cut off"),
        ("train.json", b'{"text": "a"}', "an object where a list of rows is needed"),
        ("train.csv", b"", "no row in 0 lines"),
        ("train.csv", b"prompt,completion\na,b,c\n", "3 cells where the first line names 2"),
        ("train.csv", b'prompt,completion\n"a"x,b\n', "line 2: "),
        ("train.csv", b"prompt,completion\ncaf\x8d,b\n", "byte 0x8d on line 2 is not UTF-8"),
        ("train.csv", b"prompt,completion\n\xc4\xe3,\xe3\xba\xc3\xc4\xe3\xba\n", "is not UTF-8"),
        ("train.csv", b"text,text\na,b\n", "two columns have the name 'text'"),
        ("train.csv", b"a;b\nc;d\n", 'no known format; the fields are "a", "b"'),
        ("train.jsonl", '{"text": "a"}'.encode("utf-16"), "text in UTF-16"),
        ("train.jsonl.gz", b"no gzip", "a damaged gzip file"),
        ("train.jsonl.gz", CUT_OFF, "a damaged gzip file"),
        ("train.parquet", b"no parquet", "no Parquet file"),
    ],
)
def test_a_broken_file_is_one_message_with_a_fix(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert message in str(caught.value) and "fix: " in str(caught.value)
    assert "\x00" not in str(caught.value)


def test_a_gzip_that_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LORA_LIMITS", "expanded_bytes=1024")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b" " * 2**20))
    with pytest.raises(DataError, match="more than .* bytes of text") as caught:
        read_rows(tmp_path / "train.jsonl.gz")
    assert str(caught.value).endswith(limit_hint("expansion"))


def test_a_missing_pyarrow_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'jax-lora\[parquet\]'"):
        read_rows(tmp_path / "train.parquet")


def test_a_folder_may_hold_any_kind_but_one_file_a_split(tmp_path):
    (tmp_path / "train.csv").write_text(CONTENTS["train.csv"])
    (tmp_path / "val.json").write_text(CONTENTS["train.json"])
    assert {*read_data(tmp_path).splits} == {"train", "valid"}
    (tmp_path / "train.jsonl").write_text(CONTENTS["train.jsonl"])
    with pytest.raises(DataError, match=r"train.jsonl and train.csv"):
        read_data(tmp_path)


def test_a_folder_of_texts_is_a_document_a_file(tmp_path):
    (tmp_path / "src").mkdir()
    for number in range(40):
        (tmp_path / "src" / f"m{number:02d}.py").write_text(f"x = {number}\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "out").symlink_to("/etc/hostname")
    data = read_data(tmp_path)
    assert {name: len(file.rows) for name, file in data.splits.items()} == {
        "test": 2,
        "valid": 2,
        "train": 36,
    }
    train = data.split("train")
    assert {row.kind for row in train.rows} == {"document"} and train.skipped == 3
    assert train.rows[0].fields["file"].startswith("src/m")


@pytest.mark.parametrize("read", [read_data, read_whole])
@pytest.mark.parametrize(
    ("name", "content", "got"),
    [
        ("rows.xlsx", b"PK\x03\x04\0", "a file that ends in '.xlsx'"),
        ("run.yaml", b"rank: 8\n", "a file that ends in '.yaml'"),
        ("book.txt", b" \n", "a file without text"),
        ("book.txt", b"a\0b", "a file without text"),
        ("rows", b"a,b\n", "a file without an ending"),
        ("rows.gz", b"\x1f\x8b", "a file that ends in '.gz'"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, got, read):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"got:      {got}\n"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.txt", "rows.dat", "rows"])
def test_json_lines_have_any_name(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    assert [row.kind for row in read_whole(tmp_path / name).rows] == ["completions"] * 3
    assert len(read_data(tmp_path / name).split("train").rows) == 3


@pytest.mark.parametrize("name", ["book.txt", "notes.md"])
def test_a_text_is_a_document(tmp_path, name):
    text = "It was a dark night.\n" * 500  # 10,500 characters
    (tmp_path / name).write_text(text)
    data = read_data(tmp_path / name)
    parts = [data.split(each).rows[0].fields["text"] for each in ("train", "valid", "test")]
    assert "".join(parts) == text
    pieces = [row.fields["text"] for row in read_whole(tmp_path / name).rows]
    assert len(pieces) == 3 and "".join(pieces) == text


@pytest.mark.parametrize(
    "content",
    [
        b"sep=;\nprompt;completion\na,b;c\n",
        "prompt;completion\r\na,b;c\r\n".encode("utf-16"),
        b"prompt|completion\na,b|c\n",
    ],
)
def test_separators_and_encodings_of_spreadsheets_are_detected(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    (row,) = read_rows(path).rows
    assert row.fields == {"prompt": "a,b", "completion": "c"}


def test_windows_1252_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\nin the caf\xe9,yes\n")
    assert read_rows(path).rows[0].fields["prompt"] == "in the caf\u00e9"


def test_nulls_inside_parquet_are_removed(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"text": "a", "extra": {"x": 1}}, {"text": "b", "extra": {"y": [None, 2]}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = read_rows(tmp_path / "rows.parquet").rows
    assert [row.fields for row in read] == rows


def test_a_key_that_occurs_twice_is_a_problem_of_its_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "prompt": "b", "completion": "c"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*a duplicate key 'prompt'"):
        read_rows(file)
