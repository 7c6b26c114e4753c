import pytest

from jax_lora.data.encoding import encode_prompt, encode_row
from jax_lora.data.formats import check_fields
from jax_lora.data.prompt_template import PromptTemplate, prompt_template_text
from jax_lora.data.rows import Row
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError, DataError
from tests.tiny_model import write_tokenizer

TEMPLATE = "{system}\n\nQ: {prompt}\nA:"
ALPACA = {"instruction": "add", "input": "2 3", "output": " 5", "system": "brief"}


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path), prompt_template=TEMPLATE)


def encoded(tokenizer, row):
    kind, fields = check_fields(row)
    return encode_row(Row(1, kind, fields), tokenizer)


def shown(tokenizer, row):
    """Return the text of an example with its targets in brackets."""
    ids, mask, *_ = encoded(tokenizer, row)
    runs = ""
    for index, target in zip(ids, mask, strict=True):
        runs += f"[{tokenizer.decode_all([index])}]" if target else tokenizer.decode_all([index])
    return runs.replace("][", "")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "2+3?", "completion": " 5"}, "Q: 2+3?\nA:[ 5<|end|>]"),
        (ALPACA, "brief\n\nQ: add\n\n2 3\nA:[ 5<|end|>]"),
        (
            {**ALPACA, "history": [["hi", "yes"]]},
            "brief\n\nQ: hi\nA:yes<|end|>Q: add\n\n2 3\nA:[ 5<|end|>]",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "yes"},
                    {"role": "user", "content": "no?"},
                    {"role": "assistant", "content": "no"},
                ]
            },
            "Q: hi\nA:[yes<|end|>]Q: no?\nA:[no<|end|>]",
        ),
        ({"text": "plain"}, "[plain<|end|>]"),
    ],
)
def test_every_kind_of_example_has_the_format(tokenizer, row, text):
    assert shown(tokenizer, row) == text


@pytest.mark.parametrize("row", [ALPACA, {"prompt": "a", "completion": "b"}])
def test_prompts_are_encoded_as_in_training(tokenizer, row):
    ids, mask, *_ = encoded(tokenizer, row)
    prompt = encode_prompt(check_fields(row)[1], tokenizer)
    assert prompt == [i for i, target in zip(ids, mask, strict=True) if not target]


def test_the_tokens_of_the_template_are_not_those_of_the_text(tokenizer):
    words = tokenizer.encode("2+3?") + tokenizer.encode(" 5")
    assert encoded(tokenizer, {"prompt": "2+3?", "completion": " 5"}).raw == len(words)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("Question:", "0 times {prompt}"),
        ("{prompt}{prompt}", "2 times {prompt}"),
        ("{question}", "the field {question}"),
        ("{prompt:>5}", "a field with a format"),
        ("{prompt.x}", "the field {prompt.x}"),
        ('{"a": {prompt}}', "the field"),
        ("{prompt", "expected '}'"),
        ("{}", "the field {}"),
    ],
)
def test_a_template_with_other_fields_is_refused(text, got):
    with pytest.raises(ConfigError, match="prompt_template") as caught:
        PromptTemplate(text)
    assert got in str(caught.value)


def test_a_template_is_a_text_or_a_file(tmp_path):
    assert prompt_template_text(r"Q: {prompt}\nA:") == "Q: {prompt}\nA:"
    (tmp_path / "format.txt").write_text("\\n{{{prompt}}}\n\n")
    text = prompt_template_text(str(tmp_path / "format.txt"))
    assert PromptTemplate(text).format("x") == "\\n{x}\n"
    assert prompt_template_text(r"\n{prompt}", escaped=False) == r"\n{prompt}"
    with pytest.raises(ConfigError, match="no such file"):
        prompt_template_text(str(tmp_path / "absent.txt"))


def test_what_a_template_cannot_show_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"without \{system\}"):
        PromptTemplate("{prompt}").format("a", "be brief")
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for turns in ([user, user], [answer], [user, {"role": "tool", "content": "c"}]):
        with pytest.raises(DataError, match="user and assistant in turn"):
            tokenizer.render(turns)
    with pytest.raises(DataError, match="does not show them"):
        tokenizer.render([user], tools=[{"name": "f"}])
