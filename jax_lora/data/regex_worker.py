"""Try regular expressions on long texts: the script of the process that `regex_trial.py` starts.

It imports only tokenizers and the standard library. Its input is JSON with `path`, `patterns`,
`seconds` and `memory`; its output is the message of the first failure, as JSON, or null.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

try:
    import resource
except ImportError:  # Windows: the parent's deadline is the only limit
    resource = None

_LENGTH = 1000  # characters of a text: few enough for quadratic time, but not for cubic time
_MOST_PIECES = 32
_PIECES = ("a", "A", "1", " ", "\n", ".", "é", "中", "-")
_ENDS = ("", "!", "\n", "é")


def main() -> None:
    """Read the request, and write the answer."""
    request = json.loads(sys.stdin.buffer.read())
    sys.path += [entry for entry in request["path"] if entry not in sys.path]
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"],) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"],) * 2)
    problem = next(filter(None, map(_problem, request["patterns"])), None)
    sys.stdout.write(json.dumps(problem))


def _problem(pattern: str) -> str | None:
    """Describe how a search fails, or return None; loading reports an invalid pattern."""
    import tokenizers

    try:
        splitter: Any = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    except Exception:
        return None
    for text in _texts(pattern):
        try:
            splitter.pre_tokenize_str(text)
        except BaseException as error:  # a Rust panic
            return f"{pattern[:80]!r}: {str(error)[:100]} in {text[:3]!r}..."
    return None


def _texts(pattern: str) -> Iterator[str]:
    # Some texts end with the pattern: the library skips texts without the letters that it needs.
    words = dict.fromkeys([*_PIECES, *re.findall(r"\w+|[^\w\s]", pattern), *pattern])
    for piece in list(words)[:_MOST_PIECES]:
        for end in (*_ENDS, f"!{pattern}", f"\n{pattern}"):
            yield piece * (_LENGTH // len(piece)) + end


if __name__ == "__main__":
    main()
