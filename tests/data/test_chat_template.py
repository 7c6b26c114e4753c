import json
import time

import pytest

from jax_lora.data import chat_template
from jax_lora.data.bounds import time_limit
from jax_lora.data.chat_template import ChatTemplate
from jax_lora.errors import DataError, ModelError
from tests.tiny_model import write_tokenizer

TURNS = [{"role": "user", "content": "hi"}]


def rendered(tmp_path, template, turns=TURNS):
    return ChatTemplate(write_tokenizer(tmp_path / "model", template=template)).render(turns)


def test_a_template_in_a_file_of_its_own_is_used(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert ChatTemplate(folder).render(TURNS) == "hi!"


def test_a_template_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(DataError, match=r"time limit of 0\.3 seconds"):
        rendered(tmp_path, endless)
    assert time.monotonic() - began < 5


def test_a_template_that_writes_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "LONGEST", 100)
    with pytest.raises(DataError, match="200 characters"):
        rendered(tmp_path, "{% for i in range(200) %}x{% endfor %}")


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
    try:
        ChatTemplate(folder)
    except ModelError as error:
        assert "without running code" in str(error)
    assert not (tmp_path / "ran").exists()


def test_no_template_and_a_huge_one_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="a tokenizer without a chat template"):
        ChatTemplate(write_tokenizer(tmp_path / "base"))
    monkeypatch.setattr(chat_template, "LARGEST_TEMPLATE", 3)
    folder = write_tokenizer(tmp_path / "huge")
    (folder / "chat_template.jinja").write_text("long")
    with pytest.raises(ModelError, match="chat_template.jinja of more than 3 bytes"):
        ChatTemplate(folder)


def test_a_limit_is_lifted_behind_its_block():
    with time_limit(0.2):
        pass
    time.sleep(0.3)
