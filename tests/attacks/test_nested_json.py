"""JSON inside of other values: nested too deeply, repeated keys, values that are not JSON."""

import pytest

import jax_lora as jl
from jax_lora.data.rows import read_rows
from jax_lora.data.tokenizer_identity import tokenizer_identity
from jax_lora.errors import DataError, LoraError, ModelError
from jax_lora.peft.adapter_config import kept
from jax_lora.report.metrics import MetricsLog, read_metrics
from tests.tiny_model import write_tokenizer

BAD = ["[" * 900, "[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", "{"]
FIELDS = {
    "arguments": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
    '"tool_calls": [{"function": {"name": "f", "arguments": %s}}]}]}',
    "tools": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
    '"content": "b"}], "tools": %s}',
    "function_call": '{"conversations": [{"from": "human", "value": "a"}, '
    '{"from": "function_call", "value": %s}]}',
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:12])
@pytest.mark.parametrize("field", FIELDS)
def test_json_in_a_field_of_an_example_is_refused_with_its_line(tmp_path, field, text):
    quoted = '"' + text.replace('"', '\\"') + '"'
    file = tmp_path / "train.jsonl"
    file.write_text(FIELDS[field] % quoted + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl:1"):
        read_rows(file)


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:12])
def test_a_configuration_in_json_is_refused(text):
    with pytest.raises(LoraError, match="LoraConfig"):
        jl.LoraConfig.from_json(text)


@pytest.mark.parametrize("text", [*BAD, "3", '{"target_modules": [1, "q"]}', '{"r": "8"}'])
def test_an_edited_configuration_of_peft_in_metadata_is_not_used(text):
    assert kept(jl.LoraConfig(metadata={"peft": text})) is None


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:12])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_identity_of_a_damaged_tokenizer_is_refused_with_its_file(tmp_path, name, text):
    (write_tokenizer(tmp_path) / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        tokenizer_identity(tmp_path, 0)


@pytest.mark.parametrize("content", [b"\xff", bytes(70_000)])
def test_the_identity_of_a_damaged_chat_template_is_refused_with_its_file(tmp_path, content):
    (write_tokenizer(tmp_path) / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        tokenizer_identity(tmp_path, 0)


def test_metrics_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    MetricsLog(tmp_path).log({"iter": 1, "train_loss": 0.5})
    monkeypatch.setenv("JAX_LORA_LIMITS", "metrics_bytes=10")
    with pytest.raises(DataError, match=r"metrics\.jsonl[\s\S]*metrics_bytes=N"):
        read_metrics(tmp_path)
    with pytest.raises(LoraError, match="metrics_bytes=N"):
        MetricsLog(tmp_path, resume_at=1)
