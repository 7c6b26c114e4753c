import shutil
import subprocess

import pytest

import jax_lora as jl
from jax_lora.cli import main
from jax_lora.errors import ModelError


@pytest.fixture
def model(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    names = sorted(file.name for file in folder.iterdir())
    output = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, check=True)
    (tmp_path / "pins").write_bytes(output.stdout)
    return folder


def test_a_pinned_model_is_used_and_a_changed_one_is_not_read(model, tmp_path, capsys):
    command = ["generate", str(model), "--prompt", "a", "--max-tokens", "1"]
    assert main([*command, "--pin", str(tmp_path / "pins")]) == 0
    jl.models.load(model, pin=tmp_path / "pins")
    (model / "config.json").write_text("{")
    assert main([*command, "--pin", str(tmp_path / "pins")]) == 2
    assert "config.json: another SHA-256 hash" in capsys.readouterr().err
    with pytest.raises(ModelError, match="another SHA-256 hash"):
        jl.models.load(model, pin=tmp_path / "pins")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "{model}"],
        ["chat", "{model}"],
        ["predict", "{model}", "--text", "a"],
        ["plan", "{model}"],
        ["import", "{model}", "--from", "peft", "--model", "{model}"],
    ],
)
def test_every_verb_that_reads_a_model_checks_it_first(words, model, tmp_path, capsys):
    (model / "model.safetensors").write_text("")
    words = [word.format(model=model) for word in words]
    assert main([*words, "--pin", str(tmp_path / "pins")]) == 2
    assert "model.safetensors: another SHA-256 hash" in capsys.readouterr().err
