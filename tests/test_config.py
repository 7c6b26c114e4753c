import dataclasses
import json
import math
import pickle

import jax.numpy as jnp
import pytest

from jax_lora import LoraConfig
from jax_lora.config import FrozenMapping
from jax_lora.errors import ConfigError


def test_the_scale_is_alpha_over_rank():
    assert LoraConfig(rank=8, alpha=16.0).scale(8, 16.0) == 2.0
    assert LoraConfig(use_rslora=True).scale(16, 16.0) == 4.0


def test_the_first_pattern_that_matches_wins():
    config = LoraConfig(rank_pattern={"q_proj": 4, "*_proj": 2}, alpha_pattern={"attn": 3.0})
    assert [config.rank_of(f"attn/{name}/kernel") for name in ("q_proj", "k_proj", "out")] == [
        4,
        2,
        8,
    ]
    assert config.alpha_of("attn/out/kernel") == 3.0
    assert config.alpha_of("mlp/out/kernel") == 16.0


def test_json_brings_back_an_equal_config():
    config = LoraConfig(
        rank=4, targets=["q", "v"], rank_pattern={"z": 2, "a": 3}, dtype=jnp.bfloat16, dropout=0.1,
        modules_to_save="head", exclude={"b", "a"},
    )  # fmt: skip
    again = LoraConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert list(again.rank_pattern) == ["z", "a"]
    assert config.exclude == ("a", "b")
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_order_of_patterns_counts():
    one, other = ({"a": 2, "b": 3}, {"b": 3, "a": 2})
    assert LoraConfig(rank_pattern=one) != LoraConfig(rank_pattern=other)
    assert LoraConfig(rank_pattern=one).rank_pattern == one


@pytest.mark.parametrize(
    ("settings", "where", "expected"),
    [
        ({"rank": 0}, "rank", "at least 1"),
        ({"rank": -3}, "rank", "at least 1"),
        ({"rank": 2.5}, "rank", "an integer"),
        ({"rank": True}, "rank", "an integer"),
        ({"rank": 10**400}, "rank", "less than 2\\*\\*31"),
        ({"rank_pattern": {"q": 10**400}}, "rank_pattern\\['q'\\]", "less than 2"),
        ({"alpha": math.nan}, "alpha", "finite"),
        ({"alpha": math.inf}, "alpha", "finite"),
        ({"alpha": 0}, "alpha", "above 0"),
        ({"dropout": 1.0}, "dropout", "below 1"),
        ({"dropout": -0.1}, "dropout", "at least 0"),
        ({"init": "pissa"}, "init", "gaussian"),
        ({"dtype": "int8"}, "dtype", "floating"),
        ({"dtype": "float33"}, "dtype", "floating"),
        ({"dtype": None}, "dtype", "floating"),
        ({"dtype": {"type": "x"}}, "dtype", "floating"),
        ({"targets": []}, "targets", "at least one"),
        ({"targets": [3]}, "targets", "names or globs"),
        ({"targets": ""}, "targets", "names or globs"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern\\['q'\\]", "at least 1"),
        ({"rank_pattern": ["q"]}, "rank_pattern", "a mapping"),
        ({"use_rslora": "yes"}, "use_rslora", "True or False"),
        ({"use_dora": 1}, "use_dora", "True or False"),
        ({"metadata": "text"}, "metadata", "a mapping from name to text"),
        ({"metadata": {"": "text"}}, "metadata", "names that are non-empty strings"),
        ({"metadata": {3: "text"}}, "metadata", "names that are non-empty strings"),
        ({"metadata": {"peft": {"r": 8}}}, "metadata\\['peft'\\]", "a string"),
    ],
)
def test_a_value_that_means_nothing_is_refused(settings, where, expected):
    with pytest.raises(ConfigError, match=f"(?s)LoraConfig: {where}.*{expected}.*fix:"):
        LoraConfig(**settings)


def test_an_unknown_setting_asks_what_was_meant():
    with pytest.raises(ConfigError, match="(?s)'rnak'.*Did you mean 'rank'"):
        LoraConfig.from_dict({"rnak": 8})


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "[" * 5000, '{"rank": NaN}', '{"rank": 1, "rank": 2}']
)
def test_json_that_is_no_config_is_refused(text):
    with pytest.raises(ConfigError):
        LoraConfig.from_json(text)


def test_metadata_is_kept_and_never_compared_or_shown():
    text = {"note": "something long"}
    config, plain = LoraConfig(metadata=text), LoraConfig()
    assert config == plain and hash(config) == hash(plain) and repr(config) == repr(plain)
    text["note"] = "changed"
    assert config.metadata == {"note": "something long"} and plain.metadata == {}
    assert hash(config.metadata) == hash(FrozenMapping({"note": "something long"}))
    for again in (
        LoraConfig.from_json(config.to_json()),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config, rank=2),
    ):
        assert again.metadata == config.metadata
    with pytest.raises(TypeError):
        config.metadata["note"] = "changed"


def test_mappings_are_equal_in_any_order_and_hash_alike():
    one, other = FrozenMapping({"a": "1", "b": "2"}), FrozenMapping({"b": "2", "a": "1"})
    assert one == other and hash(one) == hash(other) and repr(one) == "{'a': '1', 'b': '2'}"


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        LoraConfig().rank = 3
    assert json.loads(LoraConfig().to_json())["dtype"] == "float32"
