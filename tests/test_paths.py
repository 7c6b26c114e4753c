import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_lora import paths

PATH = "params/layers/attn/q_proj/kernel"


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "attn/q_proj", "q_proj/kernel", PATH, "*_proj", "attn/*_proj", "*/q_proj/*",
        "params/*/kernel", "*attn*", "layers/*/q_proj", "[qk]_proj", "q_pro?", "/q_proj/",
    ],
)  # fmt: skip
def test_what_names_a_path(pattern):
    assert paths.matches(pattern, PATH)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("q", PATH),
        ("q_proj", "params/q_proj_norm/scale"),
        ("mlp", "params/mlp2/kernel"),
        ("attn/kernel", PATH),
        ("proj", PATH),
        ("q", "params/seq/kernel"),
        ("attn/*", "params/attn"),
        ("Q_PROJ", PATH),
    ],
)
def test_what_does_not_name_a_path(pattern, path):
    assert not paths.matches(pattern, path)


def test_a_hostile_glob_ends_at_once():
    assert not paths.matches("*a" * 40 + "b", "a" * 200)


def test_the_nearest_names_come_first():
    real = ["layers/q_proj/kernel", "layers/k_proj/kernel", "layers/mlp/kernel"]
    assert paths.nearest("q_porj", real, 1) == ["layers/q_proj/kernel"]
    assert len(paths.nearest("q_porj", real, 2)) == 2
    assert paths.nearest("q", []) == []


def test_every_kind_of_key_has_a_name():
    tree = {"a": [jnp.ones(1), (jnp.ones(1),)], 3: jnp.ones(1)}
    names = [path for path, _ in paths.flatten_with_paths({str(k): v for k, v in tree.items()})[0]]
    assert names == ["3", "a/0", "a/1/0"]


def test_an_nnx_leaf_is_named_like_a_linen_one():
    _, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert [path for path, _ in paths.flatten_with_paths(state)[0]] == ["bias", "kernel"]


def test_a_leaf_that_is_called_value_keeps_its_name():
    tree = {"value": {"kernel": 1.0}, "attn": {"value": 2.0}}
    names = [path for path, _ in paths.flatten_with_paths(tree)[0]]
    assert names == ["attn/value", "value/kernel"]
    assert jax.tree.leaves(tree) == [2.0, 1.0]
