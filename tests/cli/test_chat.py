import io
import signal

import pytest

from jax_lora.cli import main
from jax_lora.models import Llama, save
from tests.tiny_model import TINY, random_params, write_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("chat"), template=TEMPLATE)
    model = Llama(TINY)
    save(folder, model, random_params(model))
    return folder


@pytest.fixture
def talk(monkeypatch, capsys):
    def run(folder, typed, *options, code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main(["chat", str(folder), "--max-tokens", "5", *options]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


def answers(out):
    return [part.rpartition("\n[")[0] for part in out.split("> ")[1:]]


def test_an_answer_streams_and_ends_with_its_costs(talk, model_folder):
    out = talk(model_folder, "count the rows\nq\n")
    assert "continues the text that you type" in out
    assert "5 tokens, " in out and "tokens/s" in out and "GB]" in out


def test_the_streamed_text_is_what_generate_answers(talk, model_folder, capsys):
    (streamed, _) = answers(talk(model_folder, "count the rows\n"))
    main(["generate", str(model_folder), "--prompt", "count the rows", "--max-tokens", "5"])
    assert streamed == capsys.readouterr().out.rpartition("\n[")[0]


def test_history_goes_through_the_template_and_can_be_forgotten(talk, chat_folder):
    out = talk(chat_folder, "count\ncount\nr\ncount\nh\n\nq\n", "--system", "be brief")
    sizes = [int(line.split()[0][1:]) for line in out.splitlines() if line.startswith("[")]
    assert sizes[1] > sizes[0] == sizes[2]
    assert "(forgotten)" in out and out.count("q quits") == 2


def test_old_turns_are_forgotten_when_there_is_no_more_room(talk, chat_folder):
    out = talk(chat_folder, "count the rows where year\n" * 9)
    assert "turns are forgotten: the model sees 123 tokens" in out


def test_a_turn_that_never_fits_is_refused_and_the_talk_goes_on(talk, chat_folder):
    out = talk(chat_folder, "x" * 200 + "\ncount\nq\n")
    assert "(too long: " in out and "5 tokens" in out


def test_a_system_message_needs_a_template(talk, model_folder):
    assert "has no chat template" in talk(model_folder, "", "--system", "be brief", code=2)


def test_ctrl_c_ends_an_answer_and_not_the_talk(talk, model_folder, monkeypatch):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)  # in the midst of a compilation, say
        yield "co", 1
        yield "unt", 2

    monkeypatch.setattr("jax_lora.cli.chat.stream", interrupted)
    out = talk(model_folder, "one\ntwo\nq\n")
    assert out.count("co (stopped)") == 2 and "unt" not in out


def test_what_a_model_writes_does_not_steer_the_terminal(talk, model_folder, monkeypatch):
    monkeypatch.setattr("jax_lora.cli.chat.stream", lambda *_: [("\x1b[2J", 1)])
    assert r"\x1b[2J" in talk(model_folder, "one\n")
