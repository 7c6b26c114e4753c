import gzip
import json

import pytest

from jax_lora.cli import main

ROWS = [{"prompt": f"how many {n}?", "completion": f" count {n}"} for n in range(40)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n")
    return path


@pytest.fixture
def data(model_folder, capsys):
    def run(*options, code=0, model=True):
        words = [*map(str, options), *(["--model", str(model_folder)] if model else [])]
        assert main(["data", *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


def test_check_counts_examples_tokens_and_lengths(data, rows):
    out = data("check", rows)
    assert "train: " in out and "valid: " in out and "test: " in out
    assert "36 examples + 1 blank lines: 36 completions" in out
    assert "are targets (" in out and "% padding" in out
    assert "No errors found." in out


def test_check_counts_truncated_and_dropped_examples(data, rows):
    rows.write_text(json.dumps({"prompt": "x" * 50, "completion": "y"}) + "\n" + rows.read_text())
    out = data("check", rows, "--max-seq-length", "13")
    assert "truncated at 13 tokens" in out and "1 dropped, without a target token" in out


def test_check_reports_the_line_of_an_invalid_example(data, rows):
    rows.write_text(rows.read_text() + '{"prompt": "a"}\n')
    message = data("check", rows, code=2)
    assert "rows.jsonl:42: no known format" in message


def test_show_marks_targets_and_escapes_control_characters(data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "red \x1b[31m", "completion": " two"}) + "\n")
    out = data("show", path)
    assert "red \\x1b[31m[[ two<|end|>]]" in out and "\x1b" not in out
    assert "tokens, " in out and f"{path}:1: " in out
    assert "|<|end|>]]" in data("show", path, "--tokens")


def test_show_uses_a_prompt_template(data, rows):
    out = data("show", rows, "-n", "1", "--prompt-template", r"Q: {prompt}\nA:")
    assert "Q: how many" in out and "\nA:[[ count" in out


def test_show_uses_color_on_a_terminal(data, rows, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b[1;32m" in data("show", rows, "-n", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in data("show", rows, "-n", "1")


@pytest.mark.parametrize(
    ("form", "first"),
    [
        (None, ROWS[0]),
        ("text", {"text": "how many 0? count 0"}),
        (
            "chat",
            {
                "messages": [
                    {"role": "user", "content": "how many 0?"},
                    {"role": "assistant", "content": " count 0"},
                ]
            },
        ),
    ],
)
def test_convert_writes_jsonl_of_one_format(data, rows, tmp_path, form, first):
    packed = tmp_path / "rows.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    target = tmp_path / "new.jsonl"
    options = ["--to", form] if form else []
    data("convert", packed, "-o", target, *options, model=False)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert (len(lines), lines[0]) == (40, first)


def test_convert_from_completions_to_chat_and_back_changes_nothing(data, rows, tmp_path):
    data("convert", rows, "-o", tmp_path / "chat.jsonl", "--to", "chat", model=False)
    back = tmp_path / "back.jsonl"
    data("convert", tmp_path / "chat.jsonl", "-o", back, "--to", "completions", model=False)
    assert [json.loads(line) for line in back.read_text().splitlines()] == ROWS


def test_convert_refuses_to_overwrite_a_file_or_to_lose_data(data, rows, tmp_path):
    message = data("convert", rows, "-o", rows, code=2, model=False)
    assert "an existing path" in message
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n')
    message = data("convert", path, "-o", tmp_path / "x.jsonl", "--to", "chat", code=2, model=False)
    assert "text.jsonl:1" in message and "an example in the format text" in message
    assert not (tmp_path / "x.jsonl").exists()


def test_split_is_reproducible_and_its_splits_are_disjoint(data, rows, tmp_path):
    for name in ("one", "same"):
        data("split", rows, "-o", tmp_path / name, "--valid", "0.1", "--seed", "3", model=False)
    texts = {}
    for split, count in (("train", 34), ("valid", 4), ("test", 2)):
        texts[split] = (tmp_path / "one" / f"{split}.jsonl").read_text()
        assert texts[split] == (tmp_path / "same" / f"{split}.jsonl").read_text()
        assert len(texts[split].splitlines()) == count
    assert len(set("".join(texts.values()).splitlines())) == 40


def test_split_refuses_fractions_that_leave_no_training_examples(data, rows, tmp_path):
    options = ("--valid", "0.6", "--test", "0.4", "-o", tmp_path / "x")
    message = data("split", rows, *options, code=2, model=False)
    assert "to leave examples for train" in message


ROLES = ("system", "user", "assistant", "tool", "assistant")


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_convert_keeps_the_roles_of_a_chat_in_a_file_of_the_kind_of_its_name(data, tmp_path, kind):
    turns = [{"role": role, "content": f"as {role}"} for role in ROLES]
    source, target = tmp_path / "chat.json", tmp_path / f"new.{kind}"
    source.write_text(json.dumps([{"messages": turns}] * 2))
    data("convert", source, "-o", target, "--to", "chat", model=False)
    text = target.read_text()
    rows = json.loads(text) if kind == "json" else [json.loads(row) for row in text.splitlines()]
    assert rows == [{"messages": turns}] * 2


def test_convert_from_alpaca_to_chat_keeps_its_system_message_and_history(data, tmp_path):
    row = {"instruction": "a", "output": "b", "system": "s", "history": [["q", "r"]]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    data(
        "convert", tmp_path / "rows.json", "-o", tmp_path / "new.jsonl", "--to", "chat", model=False
    )
    (turns,) = json.loads((tmp_path / "new.jsonl").read_text()).values()
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [turn["role"] for turn in turns] == roles


def test_convert_writes_a_table_for_a_name_of_one_and_refuses_other_kinds(data, rows, tmp_path):
    data("convert", rows, "-o", tmp_path / "new.tsv", model=False)
    first = (tmp_path / "new.tsv").read_text().splitlines()[:2]
    assert first == ['"prompt"\t"completion"', '"how many 0?"\t" count 0"']
    message = data("convert", rows, "-o", tmp_path / "new.parquet", code=2, model=False)
    assert "ends in '.parquet'" in message
