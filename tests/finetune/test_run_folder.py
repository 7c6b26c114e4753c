import json

import jax
import jax.numpy as jnp
import pytest

from jax_lora import LoraConfig, lora_init
from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.finetune.run_folder import RunFolder, find_checkpoint, read_run_config

BASE = {"kernel": jnp.ones((3, 4))}


@pytest.fixture
def adapter():
    return lora_init(jax.random.key(0), BASE, LoraConfig(rank=2))


def run_in(path, **options):
    run, moved = RunFolder.prepare(path, **options)
    run.write_config({"rank": 2})
    return run, moved


def checkpoints(run):
    return sorted(folder.name for folder in run.path.glob("step-*"))


def test_an_earlier_run_is_moved_aside_and_never_overwritten(tmp_path, adapter):
    for number in range(3):
        run, moved = run_in(tmp_path / "adapters")
        run.save(number + 1, adapter, BASE)
        assert moved == (tmp_path / f"adapters.{number}" if number else None)
    assert checkpoints(run) == ["step-000003"]
    assert (tmp_path / "adapters.1" / "step-000001").is_dir()
    assert (tmp_path / "adapters.2" / "step-000002").is_dir()


@pytest.mark.parametrize("content", ["notes.txt", "config.yaml"])
def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(ConfigError, match="a folder with something else in it"):
        RunFolder.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [content]


def test_the_newest_checkpoints_and_the_best_one_stay(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run", keep=2)
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 4.0), start=1):
        run.note_validation(step, loss)
        run.save(step, adapter, BASE)
    assert checkpoints(run) == ["step-000002", "step-000004", "step-000005"]
    state = json.loads((run.path / "run.json").read_text())
    assert state == {"last": "step-000005", "best": "step-000002", "best_val_loss": 1.0}


def test_a_step_is_saved_once(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run")
    assert run.save(5, adapter, BASE) == (run.path / "step-000005", True)
    assert run.save(5, adapter, BASE) == (run.path / "step-000005", False)


def test_only_a_lower_loss_is_better_and_no_number_never_is(tmp_path):
    run, _ = run_in(tmp_path / "run")
    losses = (2.0, 2.0, float("nan"), 1.0)
    assert [run.note_validation(step, loss) for step, loss in enumerate(losses)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_run_means_its_best_checkpoint_and_without_validation_its_last(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run")
    run.save(1, adapter, BASE)
    run.save(2, adapter, BASE)
    assert find_checkpoint(run.path).name == "step-000002"
    run.note_validation(3, 1.0)
    run.save(3, adapter, BASE)
    run.save(4, adapter, BASE)
    assert find_checkpoint(run.path).name == "step-000003"
    assert find_checkpoint(run.path / "step-000002").name == "step-000002"
    assert read_run_config(run.path / "step-000002") == {"rank": 2}


def test_no_checkpoint_is_an_error_that_names_the_path(tmp_path):
    run, _ = run_in(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run\n  got:      no checkpoint there"):
        find_checkpoint(run.path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", ["../outside", "/tmp", "..", "a/b"])
def test_a_name_in_a_file_cannot_lead_out_of_the_folder(tmp_path, name):
    run, _ = run_in(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (run.path / "run.json").write_text(json.dumps({"last": name, "best": name}))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        find_checkpoint(run.path)


def test_metrics_are_a_json_object_a_line(tmp_path):
    run, _ = run_in(tmp_path / "run")
    run.log({"iter": 1, "train_loss": 0.5})
    run.log({"iter": 2, "train_loss": 0.25})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines] == [1, 2]
