"""`jax-lora init` writes a file that `train -c` reads."""

import pytest
import yaml

from jax_lora.cli import main
from jax_lora.cli import write_config as init
from jax_lora.cli.options import DEFAULTS, PLACES, make_settings, read_config_file
from jax_lora.finetune.settings import TrainSettings

NAMES = [*DEFAULTS, *PLACES]


def test_every_option_of_train_occurs_once(tmp_path):
    text = init.make_text()
    for name in NAMES:
        lines = [line for line in text.splitlines() if line.lstrip("# ").startswith(f"{name}:")]
        assert len(lines) == 1, name
    assert set(init.train_options()) == set(NAMES)
    assert all(init.train_options().values())


def test_all_lines_without_comment_signs_give_the_defaults(tmp_path):
    lines = init.make_text().splitlines()
    settings = [line.removeprefix("# ") for line in lines if _is_setting(line)]
    values = yaml.safe_load("\n".join(settings))
    assert {*values} == {*NAMES}
    (tmp_path / "all.yaml").write_text("\n".join(settings))
    read = read_config_file(tmp_path / "all.yaml", NAMES)
    chosen = {name: value for name, value in read.items() if name in DEFAULTS and value is not None}
    assert make_settings(chosen) == TrainSettings()


def _is_setting(line):
    return any(line.removeprefix("# ").startswith(f"{name}: ") for name in NAMES)


@pytest.mark.slow
def test_train_accepts_the_unchanged_file(model_folder, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert "Next: jax-lora train -c lora.yaml" in capsys.readouterr().out
    command = ["train", str(model_folder), "--data", str(data_folder), "-c", "lora.yaml"]
    assert main([*command, "--iters", "1", "--rank", "2"]) == 0
    saved = yaml.safe_load((tmp_path / "adapters" / "config.yaml").read_text())
    assert (saved["rank"], saved["learning_rate"]) == (2, TrainSettings().learning_rate)


def test_the_unchanged_file_has_no_effect(tmp_path):
    (tmp_path / "lora.yaml").write_text(init.make_text())
    assert read_config_file(tmp_path / "lora.yaml", NAMES) == init._PLACES


def test_an_existing_file_is_not_overwritten(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("rank: 3\n")
    assert main(["init", str(file)]) == 2
    assert "got:      an existing file, which is unchanged" in capsys.readouterr().err
    assert file.read_text() == "rank: 3\n"


def test_a_missing_folder_is_one_message(tmp_path, capsys):
    assert main(["init", str(tmp_path / "no" / "lora.yaml")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_the_preset_has_mlx_lms_defaults(tmp_path):
    (tmp_path / "mlx.yaml").write_text(init.make_text("mlx"))
    values = read_config_file(tmp_path / "mlx.yaml", NAMES)
    settings = make_settings({name: values[name] for name in values if name in DEFAULTS})
    config = settings.lora_config()
    assert config.scale(config.rank, config.alpha) == 20.0
    assert (settings.iters, settings.batch_size, settings.save_every) == (1000, 4, 100)
    assert (settings.learning_rate, settings.lr_schedule) == (1e-5, "constant")
    assert (settings.mask_prompt, settings.max_grad_norm, settings.warmup) == (False, 0.0, 0.0)


def test_strings_that_yaml_would_read_as_another_type_are_quoted():
    assert init._value("all-linear") == "all-linear"
    assert [init._value(text) for text in ("no", "12", "null")] == ['"no"', '"12"', '"null"']
    assert init._value(("q_proj", "v_proj")) == '["q_proj", "v_proj"]'
