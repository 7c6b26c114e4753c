"""The shapes of GPT-3 give the figures of the LoRA paper."""

import pytest

from jax_lora.plan.arithmetic import pair_size, reduction, weight_bytes
from jax_lora.plan.paper import (
    HALF,
    NOMINAL,
    checkpoint_size,
    full_training_bytes,
    paper_lines,
)
from jax_lora.plan.planned_model import plan_shape


@pytest.fixture(scope="module")
def gpt3():
    return plan_shape("gpt3-175b", None).shape


def test_a_square_kernel_at_rank_8_has_99_61_percent_fewer():
    assert pair_size(4096, 4096, 8) == 65_536
    assert 4096 * 4096 == 16_777_216
    assert f"{reduction(4096, 4096, 8):.2%}" == "99.61%"


def test_rank_4_on_queries_and_values_needs_36_mebibytes(gpt3):
    assert checkpoint_size(gpt3) == 18_874_368
    assert checkpoint_size(gpt3) * HALF / 2**20 == 36.0


def test_the_weights_need_350_gigabytes(gpt3):
    assert NOMINAL * HALF == 350 * 10**9
    assert weight_bytes(gpt3, HALF) == pytest.approx(350e9, rel=0.003)


def test_the_checkpoint_shrinks_about_ten_thousand_times(gpt3):
    ratio = weight_bytes(gpt3, HALF) / (checkpoint_size(gpt3) * HALF)
    assert 9_000 < ratio < 10_500


def test_full_training_needs_more_than_the_paper_reports(gpt3):
    # The paper measured 1.2 TB on sharded machines; this is the minimum for Adam on one.
    assert full_training_bytes(gpt3) == pytest.approx(1.4e12, rel=0.01)


def test_the_text_explains_that_35_gigabytes_are_impossible(gpt3):
    text = " ".join(paper_lines(gpt3))
    assert "is impossible" in text
    assert "349 GB" in text
    # Even 4 bits per weight need more.
    assert weight_bytes(gpt3, HALF, "nf4") > 2 * 35e9


def test_the_lines_fit_the_screen(gpt3):
    lines = [line.split("  ") for line in paper_lines(gpt3)]
    assert max(map(len, paper_lines(gpt3))) <= 80
    assert any("18,874,368 parameters" in words and "18 M" in words[-1] for words in lines)
