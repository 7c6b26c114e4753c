"""Files of a folder that a stranger may have made: none is opened that does not lie in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_lora.errors import LoraError, format_error


def contained(folder: Path, name: Any, error: type[LoraError]) -> Path:
    """The path of `folder`'s own file `name`; nothing is opened.

    Args:
      folder: The folder.
      name: What is to be a plain file name.
      error: Class of the exception to raise.

    Returns:
      The path.

    Raises:
      LoraError: As `error`: the name is no plain file name, or is a link that leaves the folder.
    """
    if not _is_plain(name):
        raise error(
            format_error(
                str(folder),
                got=f"the file name {name!r}",
                expected="a plain file name in the folder itself",
                fix="do not trust this folder: its index points outside it.",
            )
        )
    path = folder / name
    target, root = path.resolve(), folder.resolve()
    if target.parent != root and not _is_hub_blob(target, root):
        raise error(
            format_error(
                str(path),
                got=f"a link to {target}",
                expected="a file that lies in the folder",
                fix="copy the file into the folder if you trust it.",
            )
        )
    return path


def _is_plain(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return not any(c in '/\\:"' or ord(c) < 32 for c in name)


def _is_hub_blob(target: Path, root: Path) -> bool:
    """A Hugging Face cache holds `snapshots/<commit>/` full of links into `blobs/` beside it."""
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
