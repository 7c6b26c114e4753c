"""A command that the tool prints can be pasted, also if a path has a space or a quote."""

import shlex
from types import SimpleNamespace

import pytest

from jax_lora.cli import main, train

NAME = "it's a run --here"


def printed(capsys, start="Next: "):
    """Return the words of the last command that was printed."""
    lines = capsys.readouterr().out.splitlines()
    words = shlex.split([line for line in lines if line.startswith(start)][-1][len(start) :])
    assert words[0] == "jax-lora"
    return ["a" if word == "TEXT" else word for word in words[1:]]


def test_init_prints_the_command_that_reads_the_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", f"{NAME}.yaml"]) == 0
    assert printed(capsys) == ["train", "-c", f"{NAME}.yaml"]


def test_fit_prints_a_command_with_quoted_paths(capsys, tmp_path, data_folder):
    data = tmp_path / NAME
    data.symlink_to(data_folder)
    command = ["plan", "--shape", "llama-3-8b", "--batch-size", "8", "--data", str(data)]
    asked = ["--sample-prompt", "how many?", "--sample-prompt", "a 'b'"]
    assert main([*command, *asked, "--fit", "24GB", "--no-compile"]) == 0
    typed = capsys.readouterr().out.split("Run:\n")[1].replace("\\\n", "")
    words = shlex.split(typed)
    assert words[words.index("--data") + 1] == str(data)
    first = words.index("--sample-prompt")
    assert words[first : first + 4] == asked


def test_an_interrupted_run_prints_the_command_that_resumes_it(capsys, tmp_path):
    stopped = SimpleNamespace(interrupted="SIGTERM", steps=1)
    train._print_next(None, SimpleNamespace(path=tmp_path / NAME), stopped, "plain")
    assert printed(capsys, "Resume: ") == ["train", "--resume", str(tmp_path / NAME)]


@pytest.mark.slow
def test_what_is_printed_runs(train, tmp_path, capsys, model_folder):
    assert train("--adapter-path", NAME) == 0
    assert main([*printed(capsys), "--max-tokens", "2"]) == 0
    assert main(["train", "--resume", NAME]) == 0
    assert main(["export", "--adapter-path", NAME, f"{NAME} served"]) == 0
    imported = ["--model", str(model_folder), "--adapter-path", f"{NAME} imported"]
    assert main(["import", f"{NAME} served", *imported]) == 0
    assert main([*printed(capsys), "--max-tokens", "2"]) == 0
    assert train("--adapter-path", f"{NAME} full", "--fine-tune-type", "full") == 0
    assert main([*printed(capsys), "--max-tokens", "2"]) == 0
