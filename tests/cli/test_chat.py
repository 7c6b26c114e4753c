import contextlib
import fcntl
import io
import os
import signal
import struct
import subprocess
import sys
import termios

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
    typed = "count\ncount\n/reset\ncount\n/help\n\n/exit\nnot read"
    out = talk(chat_folder, typed, "--system", "be brief")
    sizes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("[")]
    assert sizes[1] > sizes[0] == sizes[2]
    assert "(new conversation)" in out
    assert out.count("/exit quits") == out.count("/exit, q    quit") == 1


def test_single_letters_and_unknown_commands(talk, chat_folder):
    out = talk(chat_folder, "h\n/rest\nr\nq\nnot read")
    assert out.count("/exit, q    quit") == 2 and "/rest is not a command." in out
    assert "(new conversation)" in out and "response" not in out.replace("stop a response", "")


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


SPOKEN = ("the quick brown fox ", "jumps over the la", "zy dog\n", "  " + "x" * 50, " end")


@pytest.mark.slow
def test_a_terminal_wraps_responses_between_words(chat_folder):
    script = (
        "import sys, jax_lora.cli.chat as chat\n"
        f"chat.stream = lambda *_: ((piece, n) for n, piece in enumerate({SPOKEN!r}, 1))\n"
        "from jax_lora.cli import main\n"
        f"sys.exit(main(['chat', {str(chat_folder)!r}]))\n"
    )
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, **ends)
    os.close(terminal)
    os.write(controller, b"hello\n/exit\n")
    shown = b""
    with contextlib.suppress(OSError):  # raised at the end
        while part := os.read(controller, 4096):
            shown += part
    os.close(controller)
    assert process.wait() == 0, shown
    text = shown.decode().replace("\r\n", "\n")
    wrapped = f"the quick brown fox jumps over the lazy\ndog\n  {'x' * 50} end\n["
    assert wrapped in text
    assert "response 5 tokens,\n" in text and text.count("/help lists") == 1
