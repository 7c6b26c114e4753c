"""Record the results of independent measurements, each with its error, within a time limit."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Appends each result to a file at once, so that a later failure loses nothing.

    Args:
      path: A file of JSON Lines.
      deadline: `time.monotonic()` after which no measurement begins.
    """

    path: pathlib.Path
    deadline: float

    def run(self, section: str, row: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run a measurement and record its result, its error, or that no time was left."""
        began = time.monotonic()
        if began > self.deadline:
            found: dict[str, Any] = {"error": "skipped: no time was left"}
        else:
            try:
                found = work()
            except Exception as error:  # recorded; the other measurements still run
                found = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
        seconds = round(time.monotonic() - began, 2)
        line = json.dumps({"section": section, "row": row, **found, "seconds": seconds})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr, flush=True)


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read all records; a last line that was not written completely is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
