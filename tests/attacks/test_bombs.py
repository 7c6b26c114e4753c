"""A small file cannot take much time or memory."""

import gzip
import json
import resource
import struct
from typing import Any

import pytest

from jax_lora.data.rows import read_rows
from jax_lora.errors import LoraError
from jax_lora.storage.limits import VARIABLE
from tests.attacks.fuzz import attack, clocks, too_slow
from tests.attacks.readers import READERS

MOST_BYTES = 300 * 2**20

DEEP = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
KEYS = json.dumps({f"key {number}": number for number in range(20_000)}).encode()
FIELDS = json.dumps({str(number): 1 for number in range(30_000)}).encode()
DIGITS = b'{"a": ' + b"9" * 4000 + b"}"
LONG = b'{"a": "' + b"x" * (40 * 2**20) + b'"}'
ALIASES = "\n".join(["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]) + "".join(
    f"\na{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9)
)
MERGES = "a0: &a0 {k0: 1, l0: 2}" + "".join(
    f"\na{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}], k{n}: 1}}" for n in range(9)
)
SEXAGESIMAL = b"rank: 1" + b":59" * 20_000


def header(length: int, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + rest


def tensors(shape: list[int], end: int) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return header(len(text), text + b"\0" * 16)


JSON_FILES = [
    (name, file) for name, reader in READERS.items() for file in reader.files if "json" in file
]
BOMBS: dict[str, tuple[str, str, bytes]] = {
    "aliases": ("options", "lora.yaml", ALIASES.encode()),
    "merged aliases": ("options", "lora.yaml", MERGES.encode()),
    "aliases in a run": ("run", "config.yaml", ALIASES.encode()),
    "an alias of itself": ("options", "lora.yaml", b"targets: &a [*a]"),
    "deep YAML": ("options", "lora.yaml", b"rank: " + b"[" * 30_000),
    "deep YAML blocks": ("options", "lora.yaml", b"- " * 30_000),
    "a long YAML integer": ("options", "lora.yaml", SEXAGESIMAL),
    "a header of 2**63 bytes": ("tensors", "model.safetensors", header(2**63)),
    "a header of 100 MB": ("tensors", "model.safetensors", header(100_000_001)),
    "a header beyond the file": ("tensors", "model.safetensors", header(10_000, b"{}")),
    "a huge shape": ("tensors", "model.safetensors", tensors([2**40], 16)),
    "an overflowing shape": ("tensors", "model.safetensors", tensors([2**32, 2**32], 0)),
    "a huge factor": ("peft_tensors", "adapter_model.safetensors", tensors([2**40], 16)),
    "spaces": ("jsonl", "train.jsonl", b" " * 10**7),
    "a long row": ("jsonl", "train.jsonl", b"[" * 10**6),
    "a deep row": ("json", "train.json", DEEP),
    "many fields": (
        "json",
        "train.json",
        json.dumps([{str(n): 1 for n in range(300_000)}]).encode(),
    ),
    "many wrong rows": ("jsonl", "train.jsonl", b'{"texts": 1}\n' * 20_000),
    "many cells": ("csv", "train.csv", b"prompt,completion\n" + b"," * 10**6),
    "a long cell": ("csv", "train.csv", b'prompt,completion\n"' + b"a" * (17 * 2**20)),
}


def check(name: str, file: str, data: bytes, folder: Any) -> None:
    reader = READERS[name]
    reader.make(folder)
    reader.read(folder)
    (folder / file).write_bytes(reader.repair(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert attack(reader, folder) is None  # which limits the time
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_quickly(tmp_path, name):
    reader, file, data = BOMBS[name]
    check(reader, file, data, tmp_path / "files")
    with pytest.raises(LoraError):
        READERS[reader].read(tmp_path / "files")


@pytest.mark.parametrize(
    "data", [DEEP, KEYS, DIGITS, LONG], ids=["deep", "many keys", "many digits", "long"]
)
@pytest.mark.parametrize(("name", "file"), JSON_FILES)
def test_a_json_bomb_is_handled_quickly(tmp_path, name, file, data):
    check(name, file, data, tmp_path / "files")


SIZES = ("hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "head_dim")


@pytest.mark.parametrize("value", [9_999, 10**6, 10**9, 2**31 - 1, 2**40, 2**63, 10**30])
@pytest.mark.parametrize("field", [*SIZES, "num_attention_heads", "num_key_value_heads"])
def test_a_size_beyond_the_tensors_is_refused_at_once(model_folder, field, value):
    config = model_folder / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {field: value}))
    try:
        start = clocks()
        with pytest.raises(LoraError):
            READERS["model"].read(model_folder)
        assert too_slow(start) is None
    finally:
        config.write_text(whole)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "files"
    READERS["model"].make(folder)
    return folder


@pytest.mark.parametrize(
    "text", [b" " * (70 * 2**20), b'{"text":"a"}\n' * 10**6, b"[" + b"{}," * 10**7 + b"{}]"]
)
def test_a_gzip_bomb_is_refused_with_the_limit_to_raise(tmp_path, text):
    file = tmp_path / "train.json.gz"
    file.write_bytes(gzip.compress(text, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoraError, match=VARIABLE):
        read_rows(file)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


@pytest.mark.parametrize("shape", [[2**39], [2**20, 2**20], [0, 2**39], [2**10] * 12])
def test_a_manifest_cannot_ask_for_more_than_is_stored(tmp_path, shape):
    folder, reader = tmp_path / "files", READERS["adapter"]
    reader.make(folder)
    manifest = folder / "adapter.json"
    values = json.loads(manifest.read_text())
    values["whole"] = {"x": {"shape": shape, "dtype": "float32", "checksum": "0" * 32}}
    manifest.write_bytes(reader.repair(json.dumps(values).encode()))
    start = clocks()
    with pytest.raises(LoraError):
        reader.read(folder)
    assert too_slow(start) is None
