"""Streamed text is wrapped between words."""

import textwrap

import pytest

from jax_lora.report.word_wrap import WordWrap

PROSE = "It is a truth universally acknowledged, that a single man in possession of a fortune, ..."


@pytest.mark.parametrize("width", [12, 20, 80])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_pieces_of_any_size_are_wrapped_like_the_whole(width, size):
    wrap, longest = WordWrap(width), max(map(len, PROSE.split()))
    pieces = [PROSE[start : start + size] for start in range(0, len(PROSE), size)]
    shown = "".join(map(wrap.feed, pieces)) + wrap.flush()
    assert shown.split() == PROSE.split()
    if width >= longest:
        assert shown == textwrap.fill(PROSE, width, break_long_words=False)


def test_indentation_and_empty_lines_are_kept():
    code = "def f(x):\n    return x\n\n\nend "
    wrap = WordWrap(20)
    assert wrap.feed(code) + wrap.flush() == code


def test_a_line_of_wide_characters_ends_between_them():
    wrap = WordWrap(10)
    assert wrap.feed("\u4f60" * 7) + wrap.flush() == "\u4f60" * 5 + "\n" + "\u4f60" * 2


def test_a_word_longer_than_a_line_is_shown_at_once_and_unbroken():
    wrap = WordWrap(10)
    assert wrap.feed("see " + "a" * 10) == "see\n" + "a" * 10
    assert wrap.feed("b" * 5 + " c dd") + wrap.flush() == "b" * 5 + " c dd"
