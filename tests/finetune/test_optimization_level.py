"""How far XLA optimizes the steps of a run."""

import jax
import pytest

from jax_lora.finetune.optimization_level import (
    DEFAULT,
    OPTION,
    VARIABLE,
    at_optimization_level,
    optimization_level,
)


@pytest.mark.parametrize(
    ("platform", "devices", "level"),
    [("gpu", 8, "O1"), ("cuda", 2, "O1"), ("gpu", 1, DEFAULT), ("tpu", 8, DEFAULT)],
)
def test_collectives_of_several_gpus_are_pipelined(monkeypatch, platform, devices, level):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert optimization_level(platform, devices) == level


def test_the_users_level_is_kept(monkeypatch):
    monkeypatch.setenv(VARIABLE, "O0")
    assert optimization_level("gpu", 8) == "O0"


def test_the_level_ends_with_its_context(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    before = getattr(jax.config, OPTION)
    with at_optimization_level("cuda", 8):
        assert getattr(jax.config, OPTION) == "O1"
    assert getattr(jax.config, OPTION) == before
