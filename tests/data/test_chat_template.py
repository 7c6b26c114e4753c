import json

import pytest

from jax_lora.data.chat_template import ChatTemplate, Rendering
from jax_lora.errors import DataError, ModelError
from tests.tiny_model import write_tokenizer

TURNS = [{"role": "user", "content": "hi"}]
MEGABYTES = f"template_memory_bytes={2**28}"


def rendered(tmp_path, template, turns=TURNS):
    return ChatTemplate(write_tokenizer(tmp_path / "model", template=template)).render(turns)


def test_a_template_in_a_file_of_its_own_is_used(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert ChatTemplate(folder).render(TURNS) == "hi!"


@pytest.mark.parametrize(
    ("template", "limits", "name"),
    [
        ("{{ 10 ** (10 ** 9) }}", "template_seconds=1", "template_seconds"),
        ("{{ 'a' * 3000000000 }}", "", "template_memory_bytes"),
        ("{{ ([1] * 100000000) | tojson | length }}", MEGABYTES, "template_memory_bytes"),
        ("{{ 'a' * 101 }}", "template_output_bytes=100", "template_output_bytes"),
        ("{{ '\u00fc' * 60 }}", "template_output_bytes=100", "template_output_bytes"),
        ("{% for i in range(200) %}x{% endfor %}", "template_output_bytes=100", "output_bytes"),
    ],
)
def test_a_template_that_exceeds_a_limit_is_stopped(tmp_path, monkeypatch, template, limits, name):
    monkeypatch.setenv("JAX_LORA_LIMITS", limits)
    chat = ChatTemplate(write_tokenizer(tmp_path / "model", template=template))
    with pytest.raises(DataError, match=name) as error:
        chat.render(TURNS)
    assert "tokenizer_config.json" in str(error.value)
    assert f"{name}=N" in str(error.value)


def test_deep_recursion_in_a_template_is_an_error(tmp_path):
    template = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
    with pytest.raises(DataError, match="the chat template of"):
        rendered(tmp_path, template)


def test_conversations_rendered_ahead_are_those_rendered_one_by_one(tmp_path):
    template = "{{ raise_exception('no') if tools }}{{ messages[0].content * messages[0].n }}"
    folder = write_tokenizer(tmp_path / "model", template=template)
    plain, ahead = ChatTemplate(folder), ChatTemplate(folder)
    turns = [[{"role": "user", "content": "hi", "n": n}] for n in (1, 2, 2, 9)]
    ahead.render_ahead([Rendering([]), *(Rendering(each) for each in turns)])
    ahead.render_ahead([Rendering(each) for each in turns] + [Rendering(TURNS, tools=[{}])])
    assert [ahead.render(each) for each in turns] == [plain.render(each) for each in turns]
    with pytest.raises(DataError, match="no"):
        ahead.render(TURNS, tools=[{}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('touch here').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% for %}",
    ],
)
def test_a_template_reaches_nothing_and_its_faults_are_one_message(tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the chat template of"):
        text = rendered(tmp_path, template)
        raise DataError(f"the chat template of nothing gave {text!r}")
    assert not (tmp_path / "here").exists()


def test_code_of_the_folder_is_never_run(tmp_path):
    folder = write_tokenizer(tmp_path, template="{{ messages[0].content }}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    assert ChatTemplate(folder).render(TURNS) == "hi"
    assert not (tmp_path / "ran").exists()


def test_no_template_and_a_huge_one_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="a tokenizer without a chat template"):
        ChatTemplate(write_tokenizer(tmp_path / "base"))
    monkeypatch.setenv("JAX_LORA_LIMITS", "template_bytes=3")
    folder = write_tokenizer(tmp_path / "huge")
    (folder / "chat_template.jinja").write_text("long")
    with pytest.raises(ModelError, match="template_bytes=N"):
        ChatTemplate(folder)
    inline = ChatTemplate(write_tokenizer(tmp_path / "inline", template="long"))
    with pytest.raises(ModelError, match="template_bytes=N"):
        inline.render(TURNS)
