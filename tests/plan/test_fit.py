"""Search for the cheapest changes that make a run fit."""

import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.fit import SHARE, fit, formula_total
from jax_lora.plan.planned_model import plan_shape


@pytest.fixture(scope="module")
def total():
    return formula_total(plan_shape("llama-2-7b", None), 2048, 2048)


def find(total, memory, *, dtype="bfloat16", length=2048, **changed):
    settings = TrainSettings(batch_size=8, **changed)
    return fit(settings, memory, total, dtype=dtype, length=length)


def flags(found):
    return [change.flags for change in found.changes]


def test_nothing_changes_if_the_run_fits(total):
    found = find(total, 1e12)
    assert found.fits and not found.changes and found.after == found.before


def test_gradient_accumulation_comes_first(total):
    found = find(total, 250e9)
    assert flags(found) == ["--batch-size 4 --grad-accumulation-steps 2"]
    assert found.fits and found.after <= SHARE * 250e9 < found.before


def test_gradient_checkpointing_comes_next(total):
    found = find(total, 24e9)
    assert flags(found)[-1] == "--remat full"
    settings = found.settings
    assert settings.remat == "full"
    assert settings.batch_size * settings.grad_accumulation_steps == 8


def test_quantization_comes_before_what_changes_the_adapter_or_the_data(total):
    found = find(total, 10e9)
    assert flags(found)[-1] in ("--quantize int8", "--quantize nf4")
    assert found.settings.quantize != "none"
    costs = [change.cost for change in found.changes]
    assert costs == sorted(costs)


def test_if_nothing_fits_the_least_memory_is_returned(total):
    found = find(total, 1e9)
    assert not found.fits
    assert SHARE * 1e9 < found.after < found.before
    assert len(found.totals) == len(found.changes)


def test_full_fine_tuning_can_become_lora(total):
    found = find(total, 20e9, fine_tune_type="full")
    assert "--fine-tune-type lora" in flags(found)


def test_a_float32_base_can_become_16_bits():
    model = plan_shape("llama-2-7b", "float32")
    found = find(formula_total(model, 2048, 2048), 24e9, dtype="float32")
    assert "--dtype bfloat16" in flags(found)
    halved = find(formula_total(model, 2048, 2048), 24e9, dtype="bfloat16")
    assert "--dtype bfloat16" not in flags(halved)


def test_a_change_already_made_is_not_suggested(total):
    found = find(total, 24e9, grad_checkpoint=True)
    assert "--grad-checkpoint" not in flags(found)


def test_rank_and_length_have_lower_limits(total):
    settings = TrainSettings(batch_size=3, rank=4, grad_checkpoint=True, quantize="nf4")
    found = fit(settings, 1.0, total, dtype="bfloat16", length=128)
    assert (found.fits, found.changes) == (False, ())
    assert found.settings == settings


def test_full_fine_tuning_becomes_an_adapter_before_the_base_is_quantized(total):
    found = find(total, 10e9, fine_tune_type="full")
    settings = found.settings
    assert (settings.fine_tune_type, settings.quantize != "none") == ("lora", True)
    assert any(each.startswith("--fine-tune-type lora --quantize") for each in flags(found))
