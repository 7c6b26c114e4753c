"""Limits on untrusted files are raised by name."""

import re
from pathlib import Path

import pytest

from jax_lora.errors import ConfigError
from jax_lora.storage.limits import DEFAULTS, VARIABLE, limit, limit_hint


def test_a_limit_has_its_default(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert limit("json_bytes") == DEFAULTS["json_bytes"]


def test_the_environment_raises_a_limit_by_its_name(monkeypatch):
    monkeypatch.setenv(VARIABLE, "json_bytes=64000000, json_depth=7")
    assert (limit("json_bytes"), limit("json_depth")) == (64_000_000, 7)
    assert limit("template_seconds") == DEFAULTS["template_seconds"]


@pytest.mark.parametrize(
    "text", ["json_bytes", "json_bytes=", "json_bytes=0", "bytes=3", "json_bytes=-1"]
)
def test_a_wrong_limit_is_an_error_that_names_it(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=VARIABLE) as caught:
        limit("json_bytes")
    assert text in str(caught.value)


def test_the_hint_says_what_to_set():
    assert limit_hint("json_bytes").endswith("JAX_LORA_LIMITS=json_bytes=N")


def test_the_security_page_lists_every_limit_with_its_default():
    page = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", page, flags=re.MULTILINE)
    assert {name: int(value.replace(",", "")) for name, value in listed} == DEFAULTS
