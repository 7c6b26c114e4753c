"""Progress on standard error: a bar on a terminal, one line if asked, nothing beside JSON."""

import io
import sys

import pytest

from jax_lora.report.progress_bar import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, kind, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("Loading m\x1b[2J", kind) as advance:
        advance(1, 2)
        advance(2, 2)
    return stream.getvalue()


def test_a_log_gets_a_line_only_if_asked(monkeypatch):
    assert shown(monkeypatch, "auto", io.StringIO()) == ""
    assert shown(monkeypatch, "plain", Terminal()) == "Loading m\\x1b[2J\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, "auto", Terminal())
    assert "Loading m\\x1b[2J" in text and "100%" in text


@pytest.mark.parametrize("kind", ["json", "none"])
def test_nothing_is_shown_beside_json(monkeypatch, kind):
    assert shown(monkeypatch, kind, Terminal()) == ""
