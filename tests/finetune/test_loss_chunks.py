"""How many logits are in memory together, and what layers keep, by platform."""

import pytest

from jax_lora.errors import ConfigError
from jax_lora.finetune.losses import MOST_LOGITS, MOST_LOGITS_ACCELERATOR, chunk_size
from jax_lora.finetune.settings import TrainSettings


@pytest.mark.parametrize("vocabulary", [256, 32_000, 128_256, 256_000])
@pytest.mark.parametrize(
    ("platform", "most"),
    [("cpu", MOST_LOGITS), ("gpu", MOST_LOGITS_ACCELERATOR), ("tpu", MOST_LOGITS_ACCELERATOR)],
)
def test_the_logits_of_a_chunk_stay_within_the_limit(vocabulary, platform, most):
    size = chunk_size(None, vocabulary, 10**6, platform)
    assert most / 2 < size * vocabulary <= most
    assert size < 128 or size % 128 == 0


def test_devices_that_share_the_tokens_have_a_chunk_each():
    one, eight = (chunk_size(None, 128_256, 10**6, "gpu", devices) for devices in (1, 8))
    assert eight == 8 * one


def test_a_chunk_has_at_least_one_token():
    assert chunk_size(None, 2 * MOST_LOGITS, 10) == 1


@pytest.mark.parametrize(("chunk", "size"), [(7, 7), (0, 1000)])
def test_a_setting_wins_and_zero_means_all_tokens(chunk, size):
    assert chunk_size(chunk, 128_256, 1000, "gpu", 8) == size


@pytest.mark.parametrize(
    ("settings", "cpu", "gpu"),
    [
        ({}, "none", "names"),
        ({"remat": "names"}, "names", "names"),
        ({"remat": "none"}, "none", "none"),
        ({"grad_checkpoint": True}, "full", "full"),
        ({"grad_checkpoint": True, "remat": "full"}, "full", "full"),
    ],
)
def test_layers_keep_what_the_platform_and_the_settings_say(settings, cpu, gpu):
    found = TrainSettings(**settings)
    assert [found.remat_on(platform) for platform in ("cpu", "gpu", "tpu")] == [cpu, gpu, gpu]


def test_grad_checkpoint_contradicts_other_values_of_remat():
    with pytest.raises(ConfigError, match="as grad_checkpoint is set"):
        TrainSettings(grad_checkpoint=True, remat="names")
