import json

import pytest

from jax_lora.errors import CheckpointError
from jax_lora.finetune.batch_source import Tokens
from jax_lora.finetune.run_progress import RunProgress


def test_a_report_is_the_mean_over_the_tokens_since_the_last_one():
    progress = RunProgress()
    progress.add_step(loss=1.0, weight=3, tokens=Tokens(9, 10, 16), seconds=1.0)
    progress.add_step(loss=2.0, weight=1, tokens=Tokens(5, 6, 16), seconds=1.0)
    report = progress.close_window(0.1)
    assert (report.step, report.loss, report.tokens) == (2, 1.25, 16)
    assert (report.steps_per_second, report.tokens_per_second) == (1.0, 8.0)
    progress.add_step(loss=4.0, weight=1, tokens=Tokens(1, 1, 16), seconds=1.0)
    assert progress.close_window(0.1).loss == 4.0 and (progress.raw, progress.padded) == (15, 48)


def test_only_a_lower_loss_is_better_and_no_number_never_is():
    progress = RunProgress()
    assert [progress.add_validation(loss) for loss in (2.0, 2.0, float("nan"), 1.0)] == [
        True,
        False,
        False,
        True,
    ]
    assert (progress.best_loss, progress.unimproved) == (1.0, 0)


def test_progress_comes_back_from_json_to_the_bit():
    progress = RunProgress()
    progress.add_step(loss=1 / 3, weight=7, tokens=Tokens(9, 10, 16), seconds=0.1)
    progress.add_validation(2 / 3)
    assert RunProgress.from_dict(json.loads(json.dumps(progress.to_dict())), "here") == progress


@pytest.mark.parametrize(
    "values", [None, {}, {"step": "3"}, {"window": {}, "stride": 1}, {"window": {"loss": None}}]
)
def test_values_of_something_else_are_refused(values):
    with pytest.raises(CheckpointError, match="counts that cannot be read"):
        RunProgress.from_dict(values, "here")


def test_a_checkpoint_of_an_earlier_version_is_read():
    progress = RunProgress()
    progress.add_step(loss=2.0, weight=3, tokens=Tokens(9, 10, 16), seconds=1.0)
    values = progress.to_dict()
    values["learned"] = values.pop("weight")
    values["window"]["learned"] = values["window"].pop("weight")
    assert RunProgress.from_dict(values, "here") == progress
