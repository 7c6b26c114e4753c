"""Try the regular expressions of a tokenizer in a child process, before the tokenizer uses them.

The library searches with backtracking, and panics on a pattern that needs exponential time. The
panic prints on stderr, which can be redirected only for a whole process. The child process has
limits on its time and memory, and its stderr is discarded.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_lora.data import regex_worker
from jax_lora.storage.limits import limit, limit_hint

SECONDS = "template_seconds"


def regex_problem(document: Any) -> str | None:
    """Describe a regular expression of a `tokenizer.json` that fails on a long text, or None."""
    parts = [document.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    patterns = tuple(dict.fromkeys(_patterns(parts)))
    return _failure(patterns, limit(SECONDS), limit("template_memory_bytes")) if patterns else None


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _patterns(each)


@functools.lru_cache(maxsize=64)
def _failure(patterns: tuple[str, ...], seconds: int, memory: int) -> str | None:
    path = [entry for entry in sys.path if os.path.isabs(entry)]
    request = {"path": path, "patterns": patterns, "seconds": seconds, "memory": memory}
    # -I and -S: environment variables and files in the working folder have no effect.
    command = [sys.executable, "-I", "-S", str(Path(regex_worker.__file__))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds + 60,  # for a slow disk; `seconds` limits the processor time
            check=True,
        )
        return json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        return f"regular expressions that need too much time or memory. {limit_hint(SECONDS)}"
