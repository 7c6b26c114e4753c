import sys

import pytest

from jax_lora.errors import HubError
from jax_lora.hub.hub_library import hub_errors, hub_library
from jax_lora.hub.hub_name import HubName
from jax_lora.hub.repository_files import check_weights, has_weights, is_complete, wanted_files

NAME = HubName("owner/name")


def test_no_code_no_pickle_and_no_other_folder_is_wanted():
    wanted = [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    others = [
        ".gitattributes",
        "additional_chat_templates/../tool.jinja",
        "README.md",
        "chat_template.py",
        "consolidated.safetensors",
        "modeling.py",
        "onnx/model.safetensors",
        "pytorch_model.bin",
        "tokenizer.py",
        "\x1b[2Jmodel.safetensors",
        "training_args.bin",
    ]
    assert wanted_files(wanted + others) == wanted


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], "transformers import AutoModelForCausalLM"),
        (["adapter_config.json", "adapter_model.bin"], "peft import AutoPeftModelForCausalLM"),
        (["config.json", "model.gguf"], "no safetensors file"),
        (["model.safetensors"], "no config.json or adapter_config.json"),
    ],
)
def test_a_repository_without_weights_that_are_read_is_refused(files, message):
    with pytest.raises(HubError, match=message) as caught:
        check_weights(NAME, files)
    assert ("which can run code" in str(caught.value)) == any(".bin" in file for file in files)


@pytest.mark.parametrize(
    ("files", "weights", "complete"),
    [
        ({}, False, False),
        ({"config.json": "{}", "tokenizer.json": "{}"}, False, False),
        ({"config.json": "{}", "model.safetensors": ""}, True, False),
        ({"config.json": "{}", "model.safetensors": "", "vocab.txt": ""}, True, True),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, True, True),
    ],
)
def test_a_cached_folder_is_complete_with_weights_and_tokenizer(tmp_path, files, weights, complete):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert (has_weights(tmp_path), is_complete(tmp_path)) == (weights, complete)


def test_a_cached_folder_without_a_shard_is_not_complete(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "config.json").write_text("{}")
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (tmp_path / "one.safetensors").touch()
    assert not has_weights(tmp_path)
    (tmp_path / "two.safetensors").touch()
    assert has_weights(tmp_path)
    index.write_text("[]")
    assert not has_weights(tmp_path)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'jax-lora\[hub\]'"):
        hub_library(NAME)


def test_other_errors_say_what_to_try():
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(HubError, match=r"(?s)OSError: disk full.*run the command again"):
        with hub_errors(NAME):
            raise OSError("disk full")
    with pytest.raises(
        HubError, match=r"(?s)HF_HUB_OFFLINE is set, and the cache .*Unset HF_HUB_OFFLINE"
    ):
        with hub_errors(NAME):
            raise OfflineModeIsEnabled
    with pytest.raises(KeyboardInterrupt), hub_errors(NAME):
        raise KeyboardInterrupt
