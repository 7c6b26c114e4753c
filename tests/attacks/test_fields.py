"""Every field of every document, replaced by values of every type.

A third of the pairs of a field and a value keeps the suite short; `JAX_LORA_FIELDS=all` tries all.
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.fuzz import attack
from tests.attacks.mutations import VALUES
from tests.attacks.readers import READERS

# A document is known by its reader and its file; tokenizer.json has thousands of fields.
MOST_FIELDS = 150
PARTS = 1 if os.environ.get("JAX_LORA_FIELDS") == "all" else 3
DOCUMENTS = [
    (name, file)
    for name, reader in READERS.items()
    for file in reader.files
    if file.endswith(".json")
]


def replaced(value: Any, new: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies of a document, with one field after another replaced; and the field."""
    yield "", new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys[:8] if isinstance(value, list) else keys:
        inner = value[key]
        nested = replaced(inner, new) if isinstance(inner, (dict, list)) else iter([("", new)])
        for field, changed in nested:
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = changed
            yield f"{key}.{field}".rstrip("."), copy


def tried(whole: Any, most: int | None = None) -> Iterator[tuple[str, Any, bytes]]:
    """Yield a field, a value, and the document with it: each field with a third of the values.

    Each value comes to a third of the fields, and a field gets one of every three neighbors in
    `VALUES`, which are of one type.
    """
    for turn, new in enumerate(VALUES):
        for field, document in itertools.islice(replaced(whole, new), turn % PARTS, most, PARTS):
            yield field, new, json.dumps(document).encode()


def test_every_field_and_every_value_are_tried():
    whole = {"a": 1, "b": [2], "c": {"d": 3}}
    pairs = {(field, repr(new)) for field, new, _ in tried(whole)}
    assert {field for field, _ in pairs} == {"", "a", "b", "b.0", "c", "c.d"}
    assert {value for _, value in pairs} == {repr(new) for new in VALUES}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), DOCUMENTS)
def test_a_value_of_the_wrong_type_is_an_error_of_this_library(tmp_path, name, file):
    reader = READERS[name]
    folder = tmp_path / "files"
    reader.make(folder)
    reader.read(folder)  # compiles functions, so that the time of the first value is fair
    whole = json.loads((folder / file).read_text())
    found = []
    for field, new, data in tried(whole, MOST_FIELDS):
        (folder / file).write_bytes(reader.repair(data))
        if problem := attack(reader, folder):
            found.append(f"{field} = {str(new)[:40]}: {problem}")
    assert not found


FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = {file.parent.parent.name: file for file in sorted(FIXTURES.rglob("config.json"))}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_refuses_wrong_types(tmp_path, family):
    whole = json.loads(FAMILIES[family].read_text())
    reader = READERS["config"]
    found = []
    for field, new, data in tried(whole):
        (tmp_path / "config.json").write_bytes(data)
        if problem := attack(reader, tmp_path):
            found.append(f"{field} = {str(new)[:40]}: {problem}")
    assert not found
