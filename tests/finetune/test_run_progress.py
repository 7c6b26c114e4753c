import json

import pytest

from jax_lora.errors import CheckpointError
from jax_lora.finetune.run_progress import Ledger, Tokens


def test_a_report_is_the_mean_over_the_tokens_since_the_last_one():
    ledger = Ledger()
    ledger.add_step(loss=1.0, learned=3, tokens=Tokens(9, 10, 16), seconds=1.0)
    ledger.add_step(loss=2.0, learned=1, tokens=Tokens(5, 6, 16), seconds=1.0)
    report = ledger.close_window(0.1)
    assert (report.step, report.loss, report.tokens) == (2, 1.25, 16)
    assert (report.steps_per_second, report.tokens_per_second) == (1.0, 8.0)
    ledger.add_step(loss=4.0, learned=1, tokens=Tokens(1, 1, 16), seconds=1.0)
    assert ledger.close_window(0.1).loss == 4.0 and (ledger.raw, ledger.padded) == (15, 48)


def test_only_a_lower_loss_is_better_and_no_number_never_is():
    ledger = Ledger()
    assert [ledger.add_validation(loss) for loss in (2.0, 2.0, float("nan"), 1.0)] == [
        True,
        False,
        False,
        True,
    ]
    assert (ledger.best_loss, ledger.unimproved) == (1.0, 0)


def test_a_ledger_comes_back_from_json_to_the_bit():
    ledger = Ledger()
    ledger.add_step(loss=1 / 3, learned=7, tokens=Tokens(9, 10, 16), seconds=0.1)
    ledger.add_validation(2 / 3)
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())), "here") == ledger


@pytest.mark.parametrize(
    "values", [None, {}, {"step": "3"}, {"window": {}, "stride": 1}, {"window": {"loss": None}}]
)
def test_values_of_something_else_are_refused(values):
    with pytest.raises(CheckpointError, match="counts that cannot be read"):
        Ledger.from_dict(values, "here")
