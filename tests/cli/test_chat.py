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


def test_a_response_streams_and_ends_with_its_token_counts(talk, model_folder):
    out = talk(model_folder, "count the rows\nq\n")
    assert "continues the text that you type" in out
    assert "response 5 tokens, " in out and "tokens/s" in out and "GB]" in out


def test_the_streamed_text_equals_the_output_of_generate(talk, model_folder, capsys):
    (streamed, _) = answers(talk(model_folder, "count the rows\n"))
    main(["generate", str(model_folder), "--prompt", "count the rows", "--max-tokens", "5"])
    assert streamed == capsys.readouterr().out.rpartition("\n[")[0]


def test_the_history_is_in_the_prompt_until_a_reset(talk, chat_folder):
    out = talk(chat_folder, "count\ncount\nr\ncount\nh\n\nq\n", "--system", "be brief")
    sizes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("[")]
    assert sizes[1] > sizes[0] == sizes[2]
    assert "(new conversation)" in out and out.count("q quits") == 2


def test_the_oldest_turns_are_removed_at_the_length_limit(talk, chat_folder):
    out = talk(chat_folder, "count the rows where year\n" * 9)
    assert "turns were removed: the maximum is 123 tokens" in out


def test_a_turn_beyond_the_length_limit_is_refused_and_the_chat_continues(talk, chat_folder):
    out = talk(chat_folder, "x" * 200 + "\ncount\nq\n")
    assert "the maximum is 123. Shorten the message" in out and "response 5 tokens" in out


def test_a_response_longer_than_half_of_the_context_is_announced(talk, chat_folder):
    out = talk(chat_folder, "q\n", "--max-tokens", "1000")
    assert "Responses have at most 64 tokens, half of the context length." in out


def test_a_system_message_needs_a_template(talk, model_folder):
    assert "has no chat template" in talk(model_folder, "", "--system", "be brief", code=2)


def test_ctrl_c_stops_a_response_and_not_the_chat(talk, model_folder, monkeypatch):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)  # for example, during a compilation
        yield "co", 1
        yield "unt", 2

    monkeypatch.setattr("jax_lora.cli.chat.stream", interrupted)
    out = talk(model_folder, "one\ntwo\nq\n")
    assert out.count("co (stopped)") == 2 and "unt" not in out


def test_control_characters_of_a_model_are_escaped(talk, model_folder, monkeypatch):
    monkeypatch.setattr("jax_lora.cli.chat.stream", lambda *_: [("\x1b[2J", 1)])
    assert r"\x1b[2J" in talk(model_folder, "one\n")
