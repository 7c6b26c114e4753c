"""A tiny model to plan, and the settings of its run."""

import jax
import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.planned_model import plan_config
from tests.tiny_model import TINY


@pytest.fixture(autouse=True)
def promotion():
    # Optax multiplies floats with its integer step count, which strict promotion rejects.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def planned():
    return plan_config(TINY, "float32", "tiny")


@pytest.fixture
def settings():
    return TrainSettings(rank=4, batch_size=8, max_seq_length=64)
