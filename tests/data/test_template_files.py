"""Chat templates are found where models have them, and chosen by name or file."""

import json

import pytest

from jax_lora.data.chat_template import ChatTemplate
from jax_lora.data.template_files import choose_template, read_templates
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.data.tokenizer_identity import tokenizer_identity
from jax_lora.errors import ConfigError, DataError, ModelError
from tests.tiny_model import write_tokenizer

TURNS = [{"role": "user", "content": "hi"}]
NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


def folder_with(tmp_path, inside=None, **files):
    folder = write_tokenizer(tmp_path / "model", template=inside)
    for name, text in files.items():
        place = folder if name.startswith("chat") else folder / "additional_chat_templates"
        place.mkdir(exist_ok=True)
        (place / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("inside", "files", "found"),
    [
        ("I", {}, {"default": "I"}),
        (NAMED, {}, {"default": "D", "tool_use": "T"}),
        ("I", {"chat_template__jinja": "F"}, {"default": "F"}),
        (None, {"chat_template__json": json.dumps({"chat_template": "J"})}, {"default": "J"}),
        ("I", {"rag__jinja": "R"}, {"default": "I", "rag": "R"}),
        (NAMED, {"tool_use__jinja": "R"}, {"default": "D", "tool_use": "R"}),
        (None, {}, {}),
    ],
)
def test_templates_are_found_by_name(tmp_path, inside, files, found):
    assert read_templates(folder_with(tmp_path, inside, **files)) == found


def test_the_template_for_tools_is_used_for_tools(tmp_path):
    chat = ChatTemplate(folder_with(tmp_path, NAMED))
    assert chat.render(TURNS) == "D"
    assert chat.render(TURNS, tools=[{"name": "f"}]) == "T"


def test_a_template_is_chosen_by_name_or_file_and_an_unknown_name_lists_the_names(tmp_path):
    folder = folder_with(tmp_path, "I", rag__jinja="R")
    assert choose_template(folder, "rag") == "R"
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}?")
    text = choose_template(folder, str(tmp_path / "mine.jinja"))
    assert Tokenizer.load(folder, chat_template=text).render(TURNS) == "hi?"
    for choice in ("rga", str(tmp_path / "absent.jinja")):
        with pytest.raises(ConfigError) as caught:
            choose_template(folder, choice)
        assert ("default, rag" in str(caught.value)) == (choice == "rga")


def test_several_templates_without_a_default_need_a_choice(tmp_path):
    chat = ChatTemplate(folder_with(tmp_path, None, one__jinja="1", two__jinja="2"))
    with pytest.raises(DataError, match=r"one, two(.|\n)*chat_template, such as one"):
        chat.render(TURNS)


def test_a_damaged_template_or_a_link_out_of_the_folder_is_an_error(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, [{"name": "x"}])
    with pytest.raises(ModelError, match=r"chat_template.0.template"):
        read_templates(folder)
    folder = folder_with(tmp_path, None, one__jinja="1")
    (folder / "additional_chat_templates" / "two.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="a link to"):
        read_templates(folder)
    (folder / "additional_chat_templates" / "two.jinja").unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="in UTF-8"):
        read_templates(folder)
    monkeypatch.setattr("jax_lora.data.template_files._MOST_FILES", 0)
    with pytest.raises(ModelError, match="1 chat templates"):
        read_templates(folder)


def test_special_tokens_of_the_class_are_in_a_template(tmp_path):
    folder = folder_with(tmp_path, "{{ bos_token }}|{{ eos_token }}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizerFast"
    for bos in ("|<|end|>", "<s>|<|end|>"):  # null means that there is none
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert ChatTemplate(folder).render(TURNS) == bos
        settings.pop("bos_token", None)


def test_every_template_is_part_of_the_identity(tmp_path):
    folder = folder_with(tmp_path, "I")
    first = tokenizer_identity(folder, 0)
    assert tokenizer_identity(folder, 0, chat_template="I") == first
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    second = tokenizer_identity(folder, 0)
    assert first["chat template"] != second["chat template"]
    assert first["tokenizer"] == second["tokenizer"]
    assert tokenizer_identity(folder, 0, chat_template="I") == first
