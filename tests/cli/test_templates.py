"""Templates and columns of a run are written into it, and used by the commands that read it."""

import io
import json
import shutil

import jax
import pytest
import yaml

from jax_lora.cli import main

ROWS = [{"question": f"how many rows {n}?", "answer": f" count {n}"} for n in range(6)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }
    for row in ROWS
]
SHORT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}<assistant>"
PROMPTS = "Q: {prompt}\nA:"
COLUMNS = "prompt=query,completion=reply"


def write_rows(folder, rows):
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(model, data, run, *options):
    words = ["train", str(model), "--data", str(data), "--adapter-path", str(run)]
    more = ["--iters", "1", "--rank", "2", "--progress", "none"]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*words, *more, *options]) == 0
    return run


@pytest.fixture(scope="module")
def named_model(model_folder, tmp_path_factory):
    model = shutil.copytree(model_folder, tmp_path_factory.mktemp("named") / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "short.jinja").write_text(SHORT)
    return model


@pytest.fixture(scope="module")
def chat_run(named_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat_run")
    data = write_rows(folder / "data", CHATS)
    run = trained(named_model, data, folder / "run", "--chat-template", "short")
    # From now on, only the copy in the run has the template.
    (named_model / "additional_chat_templates" / "short.jinja").write_text("changed")
    return run


@pytest.fixture(scope="module")
def prompt_run(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt_run")
    rows = [{"query": row["question"], "reply": row["answer"]} for row in ROWS]
    data = write_rows(folder / "data", rows)
    template = PROMPTS.replace("\n", "\\n")
    options = ("--columns", COLUMNS, "--prompt-template", template)
    return trained(model_folder, data, folder / "run", *options)


def test_the_copy_of_the_template_in_the_run_is_used(chat_run, capsys):
    words = ["generate", "--adapter-path", str(chat_run), "--max-tokens", "1"]
    assert main([*words, "--prompt", "hi", "--chat"]) == 0
    assert main([*words, "--prompt", "<user>hi<|end|><assistant>"]) == 0
    captured = capsys.readouterr()
    first, second = [line for line in captured.out.splitlines() if "tokens" in line]
    assert "warning" not in captured.err
    assert first.split(",")[0] == second.split(",")[0]


@pytest.mark.slow
def test_eval_fuse_and_resume_use_the_copy_too(chat_run, capsys, tmp_path):
    assert main(["eval", "--adapter-path", str(chat_run), "--limit", "1", "--max-tokens", "1"]) == 0
    fused = ["fuse", "--adapter-path", str(chat_run), "--save-path", str(tmp_path / "fused")]
    assert main(fused) == 0
    assert (tmp_path / "fused" / "chat_template.jinja").read_text() == SHORT
    assert (tmp_path / "fused" / "additional_chat_templates" / "short.jinja").is_file()
    resume = ["train", "--resume", str(chat_run), "--iters", "2", "--progress", "none"]
    assert main(resume) == 0
    assert "warning" not in capsys.readouterr().err


def test_another_template_is_told_and_refused_by_resume(chat_run, capsys, tmp_path):
    (tmp_path / "mine.jinja").write_text(SHORT.replace("<", "["))
    chosen = ["--chat-template", str(tmp_path / "mine.jinja")]
    words = ["generate", "--adapter-path", str(chat_run), "--max-tokens", "1", "--prompt", "hi"]
    assert main([*words, "--chat", *chosen]) == 0
    assert "the chat template has changed" in capsys.readouterr().err
    assert main(["train", "--resume", str(chat_run), "--progress", "none", *chosen]) == 2
    assert "the chat template has changed" in capsys.readouterr().err


def test_an_edited_copy_is_refused(chat_run, capsys, tmp_path):
    run = shutil.copytree(chat_run, tmp_path / "run")
    file = run / "chat_template.jinja"
    file.write_text(file.read_text().replace("<assistant>", "<model>"))
    words = ["generate", "--adapter-path", str(run), "--prompt", "hi", "--chat"]
    assert main(words) == 2
    assert "edited after the run wrote it" in capsys.readouterr().err


def test_an_unknown_name_lists_the_names_before_a_model_is_loaded(named_model, capsys, tmp_path):
    words = ["train", str(named_model), "--data", "bundled", "--dry-run"]
    assert main([*words, "--chat-template", "shrot"]) == 2
    assert "templates of " in (error := capsys.readouterr().err) and ": short\n" in error


def test_a_prompt_template_and_columns_are_in_the_run(prompt_run, capsys, monkeypatch):
    config = yaml.safe_load((prompt_run / "config.yaml").read_text())
    assert (config["prompt_template"], config["columns"]) == (PROMPTS, COLUMNS)
    run = ["--adapter-path", str(prompt_run), "--max-tokens", "1"]
    assert main(["eval", *run, "--limit", "2"]) == 0
    assert "exact match" in capsys.readouterr().out
    sizes = []
    for more in (["--prompt", "hi"], ["--prompt", r"Q: hi\nA:", "--prompt-template", "{prompt}"]):
        assert main(["generate", *run, *more]) == 0
        sizes.append(capsys.readouterr().out.rpartition("[")[2].split(",")[0])
    assert sizes[0] == sizes[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", *run]) == 0
    out = capsys.readouterr().out
    assert f"[prompt {sizes[0].split()[0]} tokens" in out and "continues the text" not in out


@pytest.mark.slow
def test_resume_uses_the_columns_and_the_prompt_template(prompt_run):
    words = ["train", "--resume", str(prompt_run), "--progress", "none"]
    assert main([*words, "--iters", "2"]) == 0


def test_resume_refuses_another_prompt_template(prompt_run, capsys):
    words = ["train", "--resume", str(prompt_run), "--progress", "none"]
    assert main([*words, "--prompt-template", "{prompt}"]) == 2
    assert "prompt_template was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-template", "{question}"], "the field {question}"),
        (["--prompt-template", "absent.txt"], "absent.txt"),
        (["--prompt-template", "{prompt}", "--chat-template", "a"], "chat_template"),
        (["--columns", "prompt"], "FIELD=COLUMN"),
    ],
)
def test_a_wrong_template_is_an_error_at_the_start(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "adapters").exists()
