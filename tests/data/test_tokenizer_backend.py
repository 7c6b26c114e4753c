"""A tokenizer file that contradicts itself is refused before the library reads it."""

import json

import pytest

from jax_lora.data.encoder_tokenizer import EncoderTokenizer
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ModelError
from jax_lora.storage.limits import limit_hint
from tests.tiny_model import write_tokenizer

DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
CONTRADICTIONS = {
    "a merge of a token that is not there": (
        {"model": {"merges": [["a", "qqq"]]}},
        "model.merges.0 = ['a', 'qqq']: expected two tokens of model.vocab",
    ),
    "a merge of three tokens": ({"model": {"merges": ["a b c"]}}, "expected two tokens"),
    "a merge into a token that is not there": (
        {"model": {"merges": [["a", "!"]]}},
        "expected the joined token",
    ),
    "a prefix that tokens do not have": (
        {"model": {"merges": [["a", "b"]], "continuing_subword_prefix": "x" * 50}},
        "at the start of the second token",
    ),
    "a token without an id": ({"model": {"vocab": {"a": None}}}, "model.vocab.a = None"),
    "a special token that is nowhere": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        "'[X]' is not in post_processor.special_tokens",
    ),
    "a normalizer that grows": (
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 40}},
        "lengthen a text up to 1e+12 times",
    ),
    "a replacement of nothing": (
        {"normalizer": {**DOUBLED, "pattern": {"String": ""}}},
        "a replacement of the empty text",
    ),
    "added tokens that are no list": ({"added_tokens": {"a": 1}}, "added_tokens = {'a': 1}"),
    "no model": ({"model": None}, "model = None: expected an object"),
}


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def change(folder, changes, name="tokenizer.json"):
    document = json.loads((folder / name).read_text())
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(document.get(key), dict)
        document[key] = {**document[key], **value} if both else value
    (folder / name).write_text(json.dumps(document))


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_an_error_without_a_panic(folder, name, capfd):
    changes, message = CONTRADICTIONS[name]
    change(folder, changes)
    for kind in (Tokenizer, EncoderTokenizer):
        with pytest.raises(ModelError, match="tokenizer.json") as caught:
            kind.load(folder)
        assert message in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


def splitting(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"pre_tokenizer": {**split, "invert": False}}


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:x+x+)+y", r"(\d*)*z", "(.+)+?[^.]z"])
def test_an_exponential_regular_expression_is_refused_without_a_panic(folder, capfd, pattern):
    change(folder, splitting(pattern))
    with pytest.raises(ModelError, match=r"tokenizer\.json[\s\S]*retry-limit") as caught:
        Tokenizer.load(folder)
    assert repr(pattern) in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "pattern",
    [
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+|\p{N}(?=(?:\p{N}{3})+(?!\p{N}))",
    ],
)
def test_the_regular_expressions_of_published_tokenizers_are_accepted(folder, pattern):
    change(folder, splitting(pattern))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("rows1234")) == "rows1234"


def test_a_panic_of_the_library_is_converted(folder):
    change(folder, splitting(r"qz(y+)+\d"))
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(ModelError, match="PanicException"):
        tokenizer.encode("qz" + "y" * 60 + "! 1")


@pytest.mark.parametrize("value", [5, ["x"], {"content": 5}, {}, "\ud800"])
def test_a_special_token_that_is_not_a_text_is_refused(folder, value):
    change(folder, {"eos_token": value}, "tokenizer_config.json")
    with pytest.raises(ModelError, match="tokenizer_config.json"):
        Tokenizer.load(folder)


def test_a_large_or_deep_tokenizer_is_not_parsed(folder, monkeypatch):
    monkeypatch.setenv("JAX_LORA_LIMITS", "tokenizer_bytes=1000")
    with pytest.raises(ModelError, match="more than 1,000 bytes") as caught:
        Tokenizer.load(folder)
    assert str(caught.value).endswith(limit_hint("tokenizer_bytes"))
    monkeypatch.setenv("JAX_LORA_LIMITS", "json_depth=2")
    with pytest.raises(ModelError, match="nested more than 2 levels"):
        Tokenizer.load(folder)
