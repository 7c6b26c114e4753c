"""The argument parser of the command, whose help is in sections."""

from __future__ import annotations

import argparse
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser with sections, and without colors in its help: they would be escaped."""

    def __init__(self, *args: Any, **named: Any):
        """Create a parser."""
        super().__init__(*args, **named)
        self.color = False
        self._sections: dict[str, Any] = {}

    def section(self, title: str) -> Any:
        """Return the argument group with this title; it is created if necessary."""
        if title not in self._sections:
            self._sections[title] = self.add_argument_group(title)
        return self._sections[title]
