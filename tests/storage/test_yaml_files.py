"""YAML files are read with limits and one error type."""

import time

import pytest

from jax_lora.errors import ConfigError
from jax_lora.storage.limits import limit_hint
from jax_lora.storage.yaml_files import read_yaml

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
HOSTILE = {
    "aliases that expand": (ALIASES, "more values, with aliases expanded, than 100,000"),
    "nested too deep": ("a: " + "[" * 1000, "nested more deeply than 100"),
    "contains itself": ("a: &a [*a]", "a value that contains itself"),
    "merges itself": ("a: &a {<<: *a}", "a value that contains itself"),
    "a key twice": ("a: 1\na: 2", "a duplicate key 'a'"),
    "a key that is a number": ("1: 2", "the key 1, which is not a string"),
    "a key that is a list": ("? [1]\n: 2", "ConstructorError"),
    "an object of Python": ("a: !!python/object/apply:os.system [ls]", "ConstructorError"),
    "no timestamp": ("a: !!timestamp x", "AttributeError"),
    "no integer": ("a: !!int ''", "IndexError"),
    "a sexagesimal integer": ("a: " + "1:" * 5000 + "1", "an integer of too many digits"),
    "an integer of 70 bits": (f"a: {2**70}", "does not fit in 64 bits"),
    "no mapping": ("- a", "a list instead of a mapping"),
    "empty": ("", "a NoneType instead of a mapping"),
}


def read(path):
    return read_yaml(path, ConfigError, expected="settings", fix="Write settings.")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_typed_error(name, tmp_path):
    text, reason = HOSTILE[name]
    (tmp_path / "a.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"a.yaml\s+got:") as caught:
        read(tmp_path / "a.yaml")
    assert reason in str(caught.value) and time.process_time() - start < 2


def test_a_limit_says_how_to_raise_it(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text("a: [[[1]]]\nb: &b [1, 2]\nc: *b")
    assert read(file)["c"] == [1, 2]
    for name, value in (("json_depth", 2), ("yaml_nodes", 5), ("yaml_bytes", 10)):
        monkeypatch.setenv("JAX_LORA_LIMITS", f"{name}={value}")
        with pytest.raises(ConfigError) as caught:
            read(file)
        assert str(caught.value).endswith(limit_hint(name))


def test_bad_utf8_and_a_missing_file_are_typed_errors(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    for name in ("a.yaml", "none.yaml"):
        with pytest.raises(ConfigError, match=name):
            read(tmp_path / name)
