"""Nothing from a file controls the terminal: control characters are escaped on both streams."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from jax_lora.cli import main
from jax_lora.errors import CheckpointWarning, DataError, format_error
from jax_lora.printable import PROSE, printable
from jax_lora.report.rich_reporter import RichReporter
from jax_lora.report.screen import ScreenedStream, screened, unscreened
from tests.report.test_reporters import tell

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\r\u202eabc\u2066\u200b"
NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\u200b]")


def test_every_kind_of_control_character_is_escaped():
    kinds = "\x00\x1b\x7f\x85\x9b\u061c\u200b\u200e\u2028\u2029\u202e\u2066\ufeff\ud800\U000e0041"
    for each in kinds:
        assert printable(f"a{each}b").isascii()
    assert printable(printable(kinds)) == printable(kinds)
    assert printable("a\n\tb", keep="") == r"a\n\tb"
    assert printable("caf\u00e9 \u4f60 \U0001f600 [red]") == "caf\u00e9 \u4f60 \U0001f600 [red]"
    assert printable("\u200d\u200c\n", keep=PROSE) == "\u200d\u200c\n"


def test_errors_and_warnings_escape_their_messages():
    message = format_error(EVIL, got=[EVIL], expected=EVIL, fix=EVIL)
    for text in (message, str(DataError(f"{EVIL}:1")), str(CheckpointWarning(EVIL))):
        assert not NOT_SHOWN.search(text) and r"\x1b[2J" in text
    with pytest.warns(CheckpointWarning, match="owned") as caught:
        warnings.warn(EVIL, CheckpointWarning, stacklevel=1)
    assert not NOT_SHOWN.search(str(caught[0].message))


def test_a_screened_stream_escapes_and_can_be_opened(capsys):
    with screened():
        print(EVIL)
        print(EVIL, file=sys.stderr)
        sys.stdout.writelines([EVIL, "\n"])
        print("\x1b[1m", end="", file=unscreened(sys.stdout))
    out, err = capsys.readouterr()
    assert not NOT_SHOWN.search(out.removesuffix("\x1b[1m") + err)
    assert out.endswith("\x1b[1m")


def test_a_stream_of_another_encoding_shows_escapes():
    raw = io.BytesIO()
    stream = ScreenedStream(io.TextIOWrapper(raw, "ascii", write_through=True))
    assert stream.write("caf\u00e9 \ud800") == 6
    assert raw.getvalue() == rb"caf\xe9 \ud800"


def test_a_traceback_that_leaves_the_command_is_escaped(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyError), screened():
        raise KeyError(EVIL)
    try:
        raise ZeroDivisionError(EVIL)
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and not NOT_SHOWN.search(err)


def test_what_is_printed_beside_a_progress_bar_is_screened(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)

    class Reporter(RichReporter):
        def stepped(self, step, loss):
            print(f"print {EVIL}")
            print(f"warn {EVIL}", file=sys.stderr)
            super().stepped(step, loss)

    with screened():
        tell(Reporter(console))
    text = out.getvalue()
    assert "owned" in text and "\x1b]0" not in text and "\x1b[2J" not in text
    assert not re.search("[\x07\x7f-\x9f\u202e\u2066]", text)


def test_the_name_of_a_run_and_text_of_examples_are_escaped(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{EVIL}.jsonl").write_text(json.dumps({"prompt": EVIL, "completion": EVIL}))
    assert main(["data", "show", f"{EVIL}.jsonl", "--tokens"]) == 0
    assert main(["plot", EVIL]) == 2
    with pytest.raises(SystemExit):
        main(["train", "--preset", EVIL])
    out, err = capsys.readouterr()
    assert not NOT_SHOWN.search(out + err) and "owned" in out and "owned" in err


@pytest.fixture
def places(model_folder, tmp_path):
    """Write files of every kind with control characters in their names and values."""

    def model(name, change):
        folder = tmp_path / name
        folder.mkdir()
        for file in model_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)

    def edit(file, **values):
        return lambda folder: (folder / file).write_text(
            json.dumps(json.loads((folder / file).read_text()) | values)
        )

    def tensors(folder, extra, metadata=None):
        values = load_file(folder / "model.safetensors")
        save_file(values | extra, folder / "model.safetensors", metadata)

    model(f"model {EVIL}", lambda folder: None)
    model("field", edit("config.json", **{EVIL: 1}))
    model("type", edit("config.json", model_type=EVIL))
    model("activation", edit("config.json", hidden_act=EVIL))
    model("eos", edit("tokenizer_config.json", eos_token=EVIL))
    model("tensor", lambda folder: tensors(folder, {EVIL: np.ones(2, np.float32)}))
    model("metadata", lambda folder: tensors(folder, {}, {EVIL: EVIL, "format": EVIL}))
    model(
        "template",
        edit("tokenizer_config.json", chat_template=f"{{{{ raise_exception({EVIL!r}) }}}}"),
    )
    row = json.dumps({"prompt": "q", "completion": " a"}) + "\n"
    (tmp_path / f"rows {EVIL}.jsonl").write_text(row * 4)
    (tmp_path / "rows.jsonl").write_text(row * 4)
    (tmp_path / "field.jsonl").write_text(json.dumps({EVIL: 1}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": EVIL, "completion": EVIL}) + "\n")
    (tmp_path / "label.jsonl").write_text(json.dumps({"text": "a", "label": EVIL}) + "\n")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    turns[0]["role"] = EVIL
    (tmp_path / "role.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "damaged.jsonl").write_text(f"{{{EVIL!r}")
    (tmp_path / "header.csv").write_text(f"prompt,{EVIL.replace(chr(13), '')}\na,b\n")
    (tmp_path / "key.yaml").write_text(json.dumps({EVIL: 1}))
    (tmp_path / "value.yaml").write_text(json.dumps({"optimizer": EVIL, "targets": [EVIL]}))
    (tmp_path / "prompts.txt").write_text(f"a {EVIL}\nb\n".replace("\r", ""))
    peft = tmp_path / "peft"
    peft.mkdir()
    name = f"base_model.model.{EVIL}.lora_A.weight"
    save_file({name: np.ones((2, 2), np.float32)}, peft / "adapter_model.safetensors", {EVIL: EVIL})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        EVIL: 1,
        "base_model_name_or_path": EVIL,
    }
    (peft / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


RUN = "run \x1b]0;owned\x07\x9b\u202e"  # Orbax reads [2J as a pattern
SHORT = ("--iters", "1", "--rank", "2")
COMMANDS = [
    [
        "train",
        f"model {EVIL}",
        "--data",
        f"rows {EVIL}.jsonl",
        "--adapter-path",
        RUN,
        *SHORT,
    ],
    [
        "train",
        f"model {EVIL}",
        "--data",
        "text.jsonl",
        "--progress",
        "json",
        "--sample-prompt",
        EVIL,
        *SHORT,
    ],
    ["generate", "--adapter-path", RUN, "--prompts", "prompts.txt", "--max-tokens", "2"],
    ["generate", "--adapter-path", f"absent {EVIL}", "--prompt", "a"],
    ["eval", "--adapter-path", RUN, "--data", f"rows {EVIL}.jsonl", "--max-tokens", "2"],
    ["plot", RUN, "--text"],
    ["import", "peft", "--model", f"model {EVIL}", "--adapter-path", "imported"],
    *(["train", name, "--data", "rows.jsonl", *SHORT] for name in ("field", "type", "activation")),
    *(["train", name, "--data", "rows.jsonl", *SHORT] for name in ("eos", "tensor", "metadata")),
    ["train", "template", "--data", "chat.jsonl", *SHORT],
    *(["data", "check", f"{name}.jsonl"] for name in ("field", "role", "damaged", "text")),
    ["data", "check", "header.csv"],
    ["data", "show", "text.jsonl"],
    ["train", f"model {EVIL}", "--data", "label.jsonl", "--task", "classes", *SHORT],
    ["train", "-c", "key.yaml"],
    ["train", "-c", "value.yaml"],
    ["train", "--preset", EVIL],
    ["train", "--data", f"absent {EVIL}", "--debug"],
    [EVIL],
    ["plan", f"absent {EVIL}"],
    ["init", f"config {EVIL}.yaml"],
    ["data", "convert", f"rows {EVIL}.jsonl", "-o", f"converted {EVIL}.jsonl"],
]


# The others run in this process, which has imported everything.
IN_A_PROCESS_OF_ITS_OWN = ([EVIL], ["train", "--data", f"absent {EVIL}", "--debug"], COMMANDS[0])


@pytest.mark.slow
def test_no_command_prints_a_control_character(places, capfd, monkeypatch):
    monkeypatch.chdir(places)
    shown = 0
    for words in COMMANDS:
        run = run_process if words in IN_A_PROCESS_OF_ITS_OWN else run_here
        text = run(words, capfd)
        assert not NOT_SHOWN.search(text), (words, text)
        assert "Traceback" not in text or "--debug" in words, (words, text)
        shown += "owned" in text
    assert shown > 20


def run_process(words, capfd):
    """Run a command as a user does, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "jax_lora", *words]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    return (done.stdout + done.stderr).decode("utf-8")


def run_here(words, capfd):
    """Run a command in this process, and return what it prints, warnings too."""
    with warnings.catch_warnings(), contextlib.suppress(SystemExit):
        warnings.simplefilter("default")
        warnings.showwarning = lambda *of, **named: print(
            warnings.formatwarning(*of[:4]), file=sys.stderr
        )
        main(words)
    return "".join(capfd.readouterr())
