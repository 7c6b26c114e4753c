"""Names of targets, and the descriptions of their devices."""

import re

import pytest

from jax_lora.errors import ConfigError
from jax_lora.plan.accelerators import ACCELERATORS, Gpu, gpu_description, parse_target

GPUS = {name: each for name, each in ACCELERATORS.items() if isinstance(each, Gpu)}


@pytest.mark.parametrize(
    ("text", "kind", "shape"),
    [
        ("h100", "h100", (1,)),
        ("h100:8", "h100", (8,)),
        ("v5e:2x4", "v5e", (2, 4)),
        ("v5p:2x2x1", "v5p", (2, 2, 1)),
    ],
)
def test_a_name_has_a_kind_and_a_shape(text, kind, shape):
    target = parse_target(text)
    assert (target.name, target.kind, target.shape) == (text, kind, shape)
    assert target.device is ACCELERATORS[kind]


@pytest.mark.parametrize(
    "text", ["", "h10", "h100:0", "h100:2x2", "h100:x", "h100:-1", "v5e:2x", "v5e:²", "H100:1"]
)
def test_other_names_are_refused_with_the_list(text):
    with pytest.raises(ConfigError) as caught:
        parse_target(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "h100, h200, v4" in message and "Write for example h100:1" in message


@pytest.mark.parametrize("name", ACCELERATORS)
def test_figures_are_plausible(name):
    device = ACCELERATORS[name]
    assert 16e9 <= device.memory <= 200e9
    assert 3e11 <= device.bandwidth <= 1e13
    assert 50 <= device.flops / device.bandwidth <= 600  # FLOPs per byte


@pytest.mark.parametrize("name", GPUS)
def test_the_description_of_a_gpu_is_balanced_text_with_its_figures(name):
    gpu = GPUS[name]
    text = gpu_description(gpu, name.upper())
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"(\w+): (\S+)", text))
    assert int(fields["core_count"]) == gpu.cores
    assert int(fields["device_memory_size"]) == gpu.memory
    assert int(fields["memory_bandwidth"]) == gpu.bandwidth
    assert fields["device_description_str"] == f'"{name.upper()}"'
    assert ("ACCELERATED_FEATURES" in text) == (gpu.capability >= (9, 0))
