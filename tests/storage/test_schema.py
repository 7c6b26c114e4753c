"""A schema names every value that does not fit, with its field."""

from collections.abc import Mapping

import pytest

from jax_lora.storage import schema

KIND = schema.fields(
    {
        "name": schema.TEXT,
        "rank": schema.integer(1, 8),
        "flag": schema.optional(schema.BOOLEAN),
        "scale": schema.NUMBER,
        "mode": schema.choice("a", 1, None),
        "layers": schema.either(schema.INTEGER, schema.list_of(schema.INTEGER)),
        "patterns": schema.object_of(schema.NUMBER),
        "pair": schema.list_of(schema.TEXT, 2),
    },
    required=("name",),
)
RIGHT = {
    "name": "x",
    "rank": 8,
    "flag": None,
    "scale": 1,
    "mode": None,
    "layers": [1, 2],
    "patterns": {"q": 0.5},
    "pair": ["a", "b"],
    "unknown": object,
}


def test_values_that_fit_have_no_problems():
    assert list(schema.problems(RIGHT, KIND)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": 1}, "name = 1: expected a string"),
        ({"rank": 9}, "rank = 9: expected an integer from 1 to 8"),
        ({"rank": True}, "rank = True: expected an integer from 1 to 8"),
        ({"flag": 0}, "flag = 0: expected true or false or null"),
        ({"scale": float("nan")}, "scale = nan: expected a finite number"),
        ({"scale": 10**400}, "scale = 1000"),
        ({"scale": 10**5000}, "scale = an integer of thousands of digits"),
        ({"mode": True}, "mode = True: expected 'a' or 1 or null"),
        ({"layers": [1, None]}, "layers.1 = None: expected an integer"),
        ({"layers": {}}, "layers = {}: expected an integer or a list of (an integer)"),
        ({"patterns": {"q": "x"}}, "patterns.q = 'x': expected a finite number"),
        ({"patterns": []}, "patterns = []: expected an object of (a finite number)"),
        ({"pair": ["a"]}, "pair = ['a']: expected a list of 2 (a string)"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_field(change, line):
    (found,) = schema.problems(RIGHT | change, KIND)
    assert found.startswith(line)


def test_a_required_field_may_not_be_absent_and_a_document_must_be_an_object():
    assert list(schema.problems({}, KIND)) == ["name = missing: expected a string"]
    kind = schema.fields({"base": schema.optional(schema.TEXT)}, required=("base",))
    assert not list(schema.problems({"base": None}, kind))
    assert list(schema.problems({}, kind)) == ["base = missing: expected a string or null"]
    assert list(schema.problems([], KIND)) == ["the document = []: expected an object"]


def test_a_long_value_is_shortened():
    (found,) = schema.problems({"name": ["x" * 10_000]}, KIND)
    assert len(found) < 150


@pytest.mark.parametrize(
    ("annotation", "fits", "not_fits"),
    [
        (int, 3, 3.0),
        (bool, True, 1),
        (float, 3, "3"),
        (str | None, None, 1),
        (int | tuple[int, ...] | None, [1], ["1"]),
        (Mapping[str, int], {}, []),
    ],
)
def test_a_kind_follows_from_a_type_annotation(annotation, fits, not_fits):
    kind = schema.of_annotation(annotation)
    assert not list(schema.problems(fits, kind)) and list(schema.problems(not_fits, kind))
