"""Common mistakes: each gives one message with the place, the cause and the fix, and code 2."""

import json
import shutil
from pathlib import Path

import pytest

from jax_lora.cli import main

ROW = '{"prompt": "how many?", "completion": " two"}\n'
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def text(content):
    return lambda path: path.write_text(content)


def raw(content):
    return lambda path: path.write_bytes(content)


# Name of the file of rows, what is in it, options, and what the message has to say.
ROWS = {
    "JSONL that is cut": ("train.jsonl", text(ROW + ROW[:20]), (), "seems to be cut off"),
    "JSONL with a mistyped field": (
        "train.jsonl",
        text('{"promt": "a", "completion": "b"}\n'),
        (),
        'train.jsonl:1: no known format; the fields are "promt", "completion"',
    ),
    "JSONL with a number for a text": (
        "train.jsonl",
        text('{"prompt": 3, "completion": "b"}\n'),
        (),
        '"prompt" is a number, not a string',
    ),
    "JSONL in Latin-1": ("train.jsonl", raw(b'{"text": "caf\xe9"}\n'), (), "is not UTF-8"),
    "JSONL in UTF-16": ("train.jsonl", raw(ROW.encode("utf-16")), (), "text in UTF-16"),
    "an empty file": ("train.jsonl", text(""), (), "no row in 0 lines"),
    "JSON that is cut": ("train.json", text("[" + ROW), (), "seems to be cut off"),
    "JSON of another shape": ("train.json", text(ROW), (), "a list of rows is needed"),
    "CSV with other columns": ("train.csv", text("a,b\n1,2\n"), (), "no known format"),
    "CSV with a cell too many": (
        "train.csv",
        text("prompt,completion\na,b,c\n"),
        (),
        "train.csv:2: 3 cells where the first line names 2",
    ),
    "Parquet that is none": ("train.parquet", raw(b"no"), (), "no Parquet file"),
    "gzip that is none": ("train.jsonl.gz", raw(b"no"), (), "a damaged gzip file"),
    "rows of which nothing is learned": (
        "train.jsonl",
        text('{"prompt": "' + "x " * 40 + '", "completion": " two"}\n'),
        ("--max-seq-length", "16"),
        "without a target token in the first 16",
    ),
    "a row that is too long": (
        "train.jsonl",
        text('{"text": "' + "x " * 40 + '"}\n'),
        ("--max-seq-length", "16", "--truncate", "error"),
        "expected: at most 16 (max_seq_length)",
    ),
    "a chat without an answer": (
        "train.jsonl",
        text(json.dumps({"messages": CHAT["messages"][:1]}) + "\n"),
        (),
        'no turn has the role "assistant"',
    ),
    "a chat for a tokenizer without a template": (
        "train.jsonl",
        text(json.dumps(CHAT) + "\n"),
        (),
        "a tokenizer without a chat template",
    ),
}


@pytest.fixture
def refused(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*options, model=model_folder):
        assert main(["train", str(model), "--iters", "1", "--rank", "2", *options]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and "fix:" in captured.err
        assert "Traceback" not in captured.err and captured.err.count("error: ") == 1
        assert not (tmp_path / "adapters").exists()
        return captured.err

    return run


@pytest.mark.parametrize("case", ROWS)
def test_rows(refused, tmp_path, case):
    name, write, options, expected = ROWS[case]
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / name)
    assert expected in refused("--data", "rows", *options)


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(ROW)
    return "rows"


def test_a_folder_that_is_not_there(refused):
    assert "no such folder or file" in refused("--data", "rowz")


def test_a_model_that_is_not_there(refused, rows):
    assert "nowhere" in refused("--data", rows, model="nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_model_without_one_of_its_files(refused, rows, model_folder, tmp_path, name):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    assert name in refused("--data", rows, model=tmp_path / "model")


def test_weights_that_are_cut(refused, rows, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused("--data", rows, model=tmp_path / "model")


def test_a_folder_that_cannot_be_written_to(train, capsys, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refuse(path, *args, **kwargs):
        if "adapters" in path.parts:
            raise PermissionError(13, "Permission denied", "adapters")
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert train() == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_disk_that_is_full(train, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_lora.storage.array_store.write_arrays", full)
    assert train() == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message and "Free some space" in message
    assert not list((tmp_path / "adapters").glob("step-??????"))


def test_a_folder_that_is_not_an_adapter(model_folder, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    words = ["generate", str(model_folder), "--adapter-path", str(tmp_path / "adapter")]
    assert main([*words, "--prompt", "a"]) == 2
    assert "adapter" in capsys.readouterr().err


def test_a_misspelled_target(refused, rows):
    message = refused("--data", rows, "--targets", "q_prj")
    assert "q_prj" in message and "q_proj" in message


def test_a_misspelled_key_of_a_config_file(refused, rows, tmp_path):
    (tmp_path / "lora.yaml").write_text("learning_rat: 1e-3\n")
    assert "Did you mean learning_rate?" in refused("--data", rows, "-c", "lora.yaml")
