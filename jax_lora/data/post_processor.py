"""Describe the special tokens around a text in the format of tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def template_processing(
    before: Sequence[str],
    after: Sequence[str],
    vocabulary: Mapping[str, int],
    *,
    before_second: bool = True,
) -> dict[str, Any]:
    """Describe the post-processor that puts tokens around a text, and around each of a pair.

    Args:
      before: Tokens before a text.
      after: Tokens after a text.
      vocabulary: Ids by token.
      before_second: Put `before` before the second text of a pair as well.

    Returns:
      The value of `post_processor`.

    Example:
      >>> template_processing(["<s>"], [], {"<s>": 1})["single"][1]
      {'Sequence': {'id': 'A', 'type_id': 0}}
    """

    def around(name: str, kind: int, before: Sequence[str]) -> list[dict[str, Any]]:
        start, end = (
            [{"SpecialToken": {"id": text, "type_id": kind}} for text in texts]
            for texts in (before, after)
        )
        return [*start, {"Sequence": {"id": name, "type_id": kind}}, *end]

    single = around("A", 0, before)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + around("B", 1, before if before_second else ()),
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary[text]], "tokens": [text]}
            for text in (*before, *after)
        },
    }
