"""A run is resumed with the configuration, the tokenizer and the template that it began with."""

import json
import re
import shutil

import pytest

from jax_lora.cli import main

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def model(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def run(model, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit_json(model / "tokenizer_config.json", {"chat_template": TEMPLATE})
    words = ["train", str(model), "--data", str(data_folder), "--iters", "2", "--rank", "2"]
    assert main([*words, "--progress", "none"]) == 0
    return tmp_path / "adapters"


def edit_json(file, change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def resume(*more):
    return main(["train", "--resume", "--progress", "none", *more])


def edit(run, *pair):
    file = run / "config.yaml"
    text = file.read_text().replace(*pair)
    assert text != file.read_text()
    file.write_text(text)


def test_an_edited_configuration_is_refused_by_name_with_the_way_out(run, capsys):
    edit(run, "iters: 2", "iters: 3")
    edit(run, "max_seq_length:", "# mine\nmax_seq_length:")
    assert resume() == 2
    error = capsys.readouterr().err
    assert "iters was 2, now 3" in error and "max_seq_length" not in error
    assert "jax-lora train -c adapters/config.yaml --adapter-path NEW_FOLDER" in error
    edit(run, "iters: 3", "iters: 2")
    assert resume("--iters", "3") == 0  # comments are free, and so is the command line
    assert (run / "step-000003").is_dir()
    assert resume() == 0


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rank: 2", "rank: 4", "rank was 2, now 4"),
        ("model: /", "model: /else", "model was '/"),
        ("seed: 0", "sed: 0", "sed is new: 0"),
    ],
)
def test_every_kind_of_edit_is_named(run, capsys, old, new, named):
    edit(run, old, new)
    assert resume("--iters", "3") == 2
    assert named in capsys.readouterr().err


def test_the_configuration_of_an_earlier_version_has_no_seal(run):
    file = run / "config.yaml"
    file.write_text(re.sub("# seal: .*\n", "", file.read_text()))
    edit(run, "iters: 2", "iters: 3")
    assert resume() == 0
    assert (run / "step-000003").is_dir()


CHANGES = {
    "the chat template has changed": (
        "tokenizer_config.json",
        {"chat_template": TEMPLATE.replace("<", "[")},
    ),
    "the tokenizer has changed": (
        "tokenizer.json",
        {"normalizer": {"type": "Lowercase"}},
    ),
    "the end-of-text token ids have changed": ("config.json", {"eos_token_id": [0, 7]}),
    "the special tokens have changed": ("tokenizer_config.json", {"bos_token": "<|end|>"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_tokens_are_refused_by_resume_and_told_by_the_other_verbs(run, model, capsys, change):
    file, values = CHANGES[change]
    edit_json(model / file, values)
    assert resume("--iters", "3") == 2
    error = capsys.readouterr().err
    assert re.search(
        rf"{change}: (its|their) checksum was [0-9a-f]{{32}}, now [0-9a-f]{{32}}", error
    )
    words = ["generate", "--adapter-path", "adapters", "--prompt", "how", "--max-tokens", "1"]
    assert main(words) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and change in error and error.count("\n") == 1


def test_truncation_and_layout_of_the_file_do_not_matter(run, model, capsys):
    edit_json(model / "tokenizer.json", {"truncation": None, "padding": None})
    assert resume("--iters", "3") == 0


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_tokens(run, model):
    record = json.loads((run / "step-000002" / "training.json").read_text())
    del record["text"], record["seal"]
    (run / "step-000002" / "training.json").write_text(json.dumps(record | {"version": 1}))
    (run / "step-000002" / "commit.json").unlink()
    edit_json(model / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert resume("--iters", "3") == 0
