"""Names of repositories on the Hub: `owner/name`, or `owner/name@revision`."""

from __future__ import annotations

import dataclasses
import os
import re

_PART = r"\w(?:[\w.-]*\w)?"
# A revision is a branch, a tag or a commit; branches may have several parts, as in refs/pr/1.
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII
)


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository, at a revision."""

    repo: str  # `owner/name`
    revision: str | None = None  # a branch, a tag or a commit; None: the default branch

    def __str__(self) -> str:
        """Return the name as it is typed."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """Parse `owner/name` or `owner/name@revision`; None for any other text, such as a path.

    Example:
      >>> parse_hub_name("Qwen/Qwen3-0.6B@main")
      HubName(repo='Qwen/Qwen3-0.6B', revision='main')
      >>> parse_hub_name("./models/qwen"), parse_hub_name("path/to/model"), parse_hub_name("a/../b")
      (None, None, None)
    """
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"] or match["repo"].endswith(".git"):
        return None
    return HubName(match["repo"], match["revision"])


def find_hub_name(path: str | os.PathLike[str]) -> HubName | None:
    """Return the Hub name that a text means, if no such local path exists; a `Path` is a path."""
    name = parse_hub_name(path) if isinstance(path, str) else None
    return None if name is None or os.path.lexists(str(path)) else name
