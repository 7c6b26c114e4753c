import dataclasses

import pytest

from jax_lora.finetune.streaming import stream


@dataclasses.dataclass
class Writer:
    """Writes the bytes of a text, a token each; a stop text ends it."""

    text: str
    stop: tuple[str, ...] = ()

    def grow(self, prompt):
        content = self.text.encode()
        yield from (list(content[:end]) for end in range(1, len(content) + 1))

    def text_of(self, tokens):
        text = bytes(tokens).decode("utf-8", "replace")
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)


def pieces(*args, **kwargs):
    return [piece for piece, _ in stream(Writer(*args, **kwargs), [1])]


def test_an_incomplete_character_is_held_back():
    assert pieces("aé東b")[:7] == ["a", "", "é", "", "", "東", "b"]


def test_the_beginning_of_a_stop_string_is_held_back():
    assert pieces("a\nb\n\nc", stop=("\n\n",)) == ["a", "", "\nb", "", ""]
    assert "".join(pieces("a\n", stop=("\n\n",))) == "a\n"


@pytest.mark.parametrize("text", ["plain", "naïve — 東京 \U0001f600", "half \ufffd", "a\n"])
def test_the_pieces_add_up_to_the_text(text):
    assert "".join(pieces(text, stop=("\n\n", "<end>"))) == text


def test_tokens_are_counted():
    assert [count for _, count in stream(Writer("abc"), [1])] == [1, 2, 3, 3]
