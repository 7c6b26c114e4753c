import dataclasses

import pytest

from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.finetune.resume import refuse_changes, stretched
from jax_lora.finetune.run_folder import RunFolder, find_checkpoint
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.training_state import find_resumable

SETTINGS = TrainSettings(rank=4)
RECORD = {"settings": SETTINGS.as_dict(), "data": {"train": "a", "valid": "b"}}
DATA = {"train": "a", "valid": "b"}


def test_the_same_settings_and_rows_go_on():
    refuse_changes(RECORD, SETTINGS, DATA)
    assert not stretched(RECORD, SETTINGS)


def test_every_setting_that_changes_the_numbers_is_named():
    other = dataclasses.replace(SETTINGS, rank=8, seed=3, batch_size=1)
    with pytest.raises(ConfigError) as caught:
        refuse_changes(RECORD, other, DATA)
    for line in ("rank was 4, now 8", "seed was 0, now 3", "batch_size was 4, now 1"):
        assert line in str(caught.value)


def test_rows_that_changed_are_named():
    with pytest.raises(ConfigError, match="the train examples have changed"):
        refuse_changes(RECORD, SETTINGS, DATA | {"train": "c"})


def test_reports_may_change_and_the_length_too():
    refuse_changes(RECORD, dataclasses.replace(SETTINGS, save_every=7, keep=1), DATA)
    longer = dataclasses.replace(SETTINGS, iters=99)
    refuse_changes(RECORD, longer, DATA)
    assert stretched(RECORD, longer)


def test_where_no_run_is_there_is_nothing_to_resume(tmp_path):
    assert find_resumable(tmp_path / "absent") is None
    assert find_resumable(tmp_path) is None
    run, _ = RunFolder.prepare(tmp_path / "run")
    run.write_config({})
    assert find_resumable(run.path) is None


def test_an_adapter_without_its_training_cannot_be_resumed(tmp_path):
    run, _ = RunFolder.prepare(tmp_path / "run")
    run.write_config({})
    run.save(1, lambda folder: folder.mkdir())
    with pytest.raises(ConfigError, match="without training state"):
        find_resumable(run.path)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ConfigError, match="without training state"):
        find_resumable(run.path)


def test_a_folder_that_is_no_run_has_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder|no checkpoint there"):
        find_checkpoint(tmp_path / "absent")
