import json

import pytest

from jax_lora.errors import CheckpointError
from jax_lora.storage.json_files import json_checksum, read_json
from jax_lora.storage.limits import limit_hint

HOSTILE = {
    "nested too deep": ("[" * 100_000, "TooDeepError: nested more than 100 levels"),
    "a number of 5000 digits": ('{"a": ' + "9" * 5000 + "}", "ValueError"),
    "NaN": ('{"a": NaN}', "the value NaN"),
    "a key twice": ('{"a": 1, "a": 2}', "a duplicate key"),
    "no object": ("[1, 2]", "a list instead of an object"),
    "cut short": ('{"a": [1, 2', "JSONDecodeError"),
    "empty": ("", "JSONDecodeError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_one_typed_error(name, tmp_path):
    text, reason = HOSTILE[name]
    file = tmp_path / "adapter.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=f"adapter.json\\s+got:\\s.*({reason})"):
        read_json(file, CheckpointError)


def test_a_file_beyond_the_limit_is_not_parsed(tmp_path, monkeypatch):
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps({"a": "x" * 2000}))
    assert read_json(file, CheckpointError)["a"]
    monkeypatch.setenv("JAX_LORA_LIMITS", "json_bytes=1000")
    with pytest.raises(CheckpointError, match="more than 1,000 bytes") as caught:
        read_json(file, CheckpointError)
    assert str(caught.value).endswith(limit_hint("json_bytes"))


def test_bad_utf8_and_a_missing_file_are_typed_errors(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="UnicodeDecodeError"):
        read_json(tmp_path / "bad.json", CheckpointError)
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        read_json(tmp_path / "none.json", CheckpointError)


def test_digest_sees_values_and_not_the_order_of_keys():
    assert json_checksum({"a": [1, 2], "b": {"c": 1, "d": 2}}) == json_checksum(
        {"b": {"d": 2, "c": 1}, "a": (1, 2)}
    )
    assert json_checksum({"a": 1}) != json_checksum({"a": 2})
