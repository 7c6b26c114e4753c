import math

import pytest

from jax_lora.errors import ConfigError
from jax_lora.finetune.settings import TrainSettings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "--batch-size\n  got:      0\n  expected: an integer of at least 1"),
        ("iters", -1, "--iters"),
        ("epochs", 0.0, "a number above 0"),
        ("learning_rate", math.nan, "--learning-rate\n  got:      nan"),
        ("learning_rate", "fast", "got:      'fast'"),
        ("warmup", 1.0, "from 0 to below 1"),
        ("lr_schedule", "round", "one of cosine, linear, constant"),
        ("truncate", "left", "one of right, drop, error"),
        ("max_grad_norm", -1.0, "a number from 0 on"),
        ("seed", -1, "an integer from 0 on"),
        ("max_seq_length", 1, "at least 2 tokens"),
        ("rank", 0, "rank"),
        ("dropout", 1.5, "dropout"),
    ],
)
def test_a_value_without_meaning_is_refused_with_its_flag(name, value, message):
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**{name: value})
    assert message in str(caught.value)


def test_epochs_become_steps_unless_steps_are_given():
    assert TrainSettings(epochs=2.5).iterations(10) == 25
    assert TrainSettings(epochs=0.01).iterations(10) == 1
    assert TrainSettings(epochs=2.5, iters=7).iterations(10) == 7


def test_settings_come_back_from_plain_values():
    settings = TrainSettings(targets=("q_proj", "v_proj"), rank=4)
    values = settings.as_dict()
    assert values["targets"] == ["q_proj", "v_proj"]
    assert TrainSettings(**{**values, "targets": tuple(values["targets"])}) == settings
