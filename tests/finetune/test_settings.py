import math

import pytest

from jax_lora.cli.options import make_settings
from jax_lora.errors import ConfigError
from jax_lora.finetune.settings import TrainSettings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "batch_size\n  got:      0\n  expected: an integer of at least 1"),
        ("iters", -1, "iters"),
        ("epochs", 0.0, "a number above 0"),
        ("learning_rate", math.nan, "learning_rate\n  got:      nan"),
        ("learning_rate", "fast", "got:      'fast'"),
        ("warmup", 1.0, "from 0 to below 1"),
        ("lr_schedule", "round", "one of cosine, linear, constant"),
        ("truncate", "left", "one of right, drop, error"),
        ("max_grad_norm", -1.0, "a number from 0 on"),
        ("seed", -1, "of at least 0"),
        ("max_seq_length", 1, "at least 2 tokens"),
        ("rank", 0, "rank"),
        ("dropout", 1.5, "dropout"),
        ("fine_tune_type", "prefix", "one of lora, dora, full"),
        ("optimizer", "adamv", "Did you mean adam"),
        ("scale", 0.0, "scale\n  got:      0.0\n  expected: a number above 0"),
        ("num_layers", 0, "at least 1; -1 for all"),
        ("loss_chunk", -1, "None or at least 0"),
        ("early_stop", 0, "None or at least 1"),
        ("lora_plus_ratio", 0.0, "a number above 0"),
        ("turns", "first", "one of all, last"),
        ("log", ("jsonl", "xml"), "some of jsonl, csv, tensorboard"),
        ("pack", "yes", "true or false"),
        ("mask_prompt", "yes", "true, false, or None"),
        ("sample_prompt", ("",), "texts that are not empty"),
    ],
)
def test_an_invalid_value_is_refused_by_name(name, value, message):
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**{name: value})
    assert message in str(caught.value)


def test_epochs_become_steps_unless_steps_are_given():
    assert TrainSettings(epochs=2.5).iterations(10) == 25
    assert TrainSettings(epochs=0.01).iterations(10) == 1
    assert TrainSettings(epochs=2.5, iters=7).iterations(10) == 7


def test_settings_survive_the_conversion_to_plain_values():
    settings = TrainSettings(targets=("q_proj", "v_proj"), rank=4)
    values = settings.as_dict()
    assert values["targets"] == ["q_proj", "v_proj"]
    assert make_settings(values) == settings


def test_full_fine_tuning_refuses_settings_of_an_adapter():
    for name, value in (("dropout", 0.1), ("lora_plus_ratio", 4.0), ("num_layers", 2)):
        with pytest.raises(ConfigError, match="which has no adapter"):
            TrainSettings(fine_tune_type="full", **{name: value})


def test_a_scale_sets_the_corresponding_alpha():
    assert TrainSettings(rank=8, scale=20.0).lora_config().scale(8, 160.0) == 20.0
    config = TrainSettings(rank=16, scale=3.0, rslora=True).lora_config()
    assert config.scale(16, config.alpha) == 3.0
    assert "alpha" not in TrainSettings(scale=3.0).as_dict()


def test_num_layers_counts_from_the_last_layer():
    assert TrainSettings(num_layers=2).lora_config(5).layers == (3, 4)
    assert TrainSettings(num_layers=9).lora_config(5).layers == (0, 1, 2, 3, 4)
    assert TrainSettings().lora_config(5).layers is None
