"""The options of train, and resuming runs."""

import json
import sys

import jax
import numpy as np
import pytest
import yaml

from jax_lora import load_adapter
from jax_lora.cli import main
from jax_lora.cli.presets import PRESETS


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Keep the several devices of the mesh "auto" in the tests of this file."""


def config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_dry_run_compiles_and_leaves_nothing(train, tmp_path, capsys):
    assert train("--dry-run") == 0
    assert "Dry run: the first step compiles; its peak memory is" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_a_resumed_run_with_more_steps_continues_at_its_last_step(train, tmp_path, capsys):
    options = ("--lr-schedule", "constant", "--warmup", "0", "--adapter-path")
    assert train(*options, "whole", "--iters", "4") == 0
    assert train(*options, "part") == 0
    capsys.readouterr()
    assert train(*options, "part", "--iters", "4", "--resume") == 0
    shown = capsys.readouterr().out
    assert "resumed from part/step-000002: 2 of 4 steps are done" in shown
    assert "the number of steps has changed" in shown
    one, other = (load_adapter(tmp_path / name / "step-000004") for name in ("whole", "part"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_resuming_needs_no_options_again(train, tmp_path, capsys):
    train("--iters", "3", "--save-every", "1")
    assert main(["train", "--resume", "adapters/step-000001"]) == 0
    assert "checkpoints after step-000001 are now in adapters/after" in capsys.readouterr().out
    assert sorted(each.name for each in (tmp_path / "adapters").glob("step-*")) == [
        "step-000001",
        "step-000002",
        "step-000003",
    ]


def test_resume_without_a_path_starts_a_run_if_there_is_none(train, tmp_path):
    assert train("--resume") == 0
    assert (tmp_path / "adapters" / "step-000002").is_dir()


def test_resuming_with_other_settings_or_rows_is_refused(train, data_folder, tmp_path, capsys):
    data = tmp_path / "rows"
    data.mkdir()
    text = (data_folder / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text)
    assert train(data=data) == 0
    assert train("--resume", "--rank", "4", data=data) == 2
    assert "rank was 2, now 4" in capsys.readouterr().err
    (data / "train.jsonl").write_text(text.replace("rows 1?", "rows 9?"))
    assert train("--resume", data=data) == 2
    assert "the train examples have changed" in capsys.readouterr().err


def test_a_path_without_a_run_cannot_be_resumed(train, capsys):
    assert train("--resume", "nowhere") == 2
    assert "no run with a checkpoint there" in capsys.readouterr().err


@pytest.mark.slow
def test_full_fine_tuning_saves_a_model_that_every_subcommand_reads(train, tmp_path, capsys):
    assert train("--fine-tune-type", "full", "--optimizer", "lion", "--learning-rate", "1e-3") == 0
    model = "adapters/step-000002"
    assert f"Next: jax-lora generate {model}" in capsys.readouterr().out
    assert main(["generate", model, "--prompt", "how", "--max-tokens", "3"]) == 0
    assert main(["eval", "--adapter-path", "adapters", "--compare-base", "--max-tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["fuse", "--adapter-path", "adapters"]) == 2
    assert "a full fine-tuning checkpoint" in capsys.readouterr().err


def test_flags_override_presets(train, tmp_path):
    assert train("--preset", "mlx", "--batch-size", "2") == 0
    chosen = config(tmp_path / "adapters")
    assert (chosen["optimizer"], chosen["scale"], chosen["batch_size"]) == ("adam", 20.0, 2)
    assert chosen["mask_prompt"] is False and "alpha" not in chosen
    assert {*PRESETS["mlx"]} <= {*chosen}


@pytest.mark.slow
def test_a_flag_replaces_its_alternative(train, tmp_path):
    assert train("--preset", "mlx", "--alpha", "8") == 0
    assert (config(tmp_path / "adapters")["alpha"], config(tmp_path / "adapters")["scale"]) == (
        8.0,
        None,
    )


def test_alpha_and_scale_together_are_refused(train, capsys):
    assert train("--alpha", "8", "--scale", "2") == 2
    assert "--alpha and --scale in the command line" in capsys.readouterr().err


def test_out_of_memory_exits_with_code_3(train, capsys, monkeypatch):
    def run_out(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("jax_lora.finetune.trainer.Trainer.train", run_out)
    assert train() == 3
    shown = capsys.readouterr().err
    assert "Out of memory allocating 9 bytes" in shown and "--grad-checkpoint" in shown
    assert "live arrays, the largest:" in shown and "float32 (" in shown


def test_other_errors_of_jax_are_not_reported_as_out_of_memory(train, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr("jax_lora.finetune.trainer.Trainer.train", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        train()


def test_the_training_state_is_in_the_checkpoint_folder(train, tmp_path):
    train()
    record = json.loads((tmp_path / "adapters/step-000002/training.json").read_text())
    assert record["ledger"]["step"] == 2 and set(record["data"]) == {"train", "valid"}


def test_a_logger_that_is_not_installed_is_refused_first(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train("--log", "wandb") == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "adapters" / "config.yaml").exists()
