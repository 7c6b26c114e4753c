"""commit.json: the mark of a complete checkpoint, with its step and checksums of its files.

The mark is written last, before the folder gets its name. It binds the files together: the record
or the adapter of another checkpoint is refused. Files in `arrays-*` and `moments` have their
checksums in adapter.json and training.json, whose checksums are in this file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jax_lora.errors import CheckpointError
from jax_lora.storage import array_store
from jax_lora.storage.atomic_writes import write_file
from jax_lora.storage.json_files import is_sealed, read_json, sealed
from jax_lora.storage.locks import LOCK

MARK, FORMAT, VERSION = "commit.json", "jax_lora checkpoint", 1
_ELSEWHERE = re.compile(r"(moments|arrays-[0-9a-f]{12})/.*")


def step_of(name: str) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for any other name."""
    found = re.fullmatch(r"step-(\d{6,})", name)
    return None if found is None else int(found[1])


def write_mark(checkpoint: Path, step: int) -> None:
    """Mark a checkpoint, whose files are all there, as complete.

    Raises:
      CheckpointError: Writing fails.
    """
    files = {
        name: checksum
        for name, checksum in array_store.checksums(checkpoint).items()
        if name not in (MARK, LOCK) and not _ELSEWHERE.fullmatch(name)
    }
    values = sealed({"format": FORMAT, "version": VERSION, "step": step, "files": files})
    write_file(checkpoint / MARK, json.dumps(values, indent=1) + "\n", CheckpointError)


def check_mark(checkpoint: Path, *, required: bool = False) -> None:
    """Check the mark of a checkpoint, and the files that it lists.

    Args:
      checkpoint: The folder. In a folder that is named for a step, the mark must be of that step.
      required: Whether a checkpoint without a mark, as earlier versions wrote them, is refused.

    Raises:
      CheckpointError: The mark or a listed file is missing or changed, or belongs to another
        checkpoint. One message names all such files.
    """
    if (checkpoint / MARK).is_file():
        problems = _problems(checkpoint, read_json(checkpoint / MARK, CheckpointError))
    else:
        problems = [f"no {MARK}, which a complete checkpoint has"] if required else []
    if problems:
        raise CheckpointError(
            str(checkpoint),
            got=problems,
            expected="the files of one checkpoint, unchanged since it was saved",
            fix="Use another checkpoint of the run, or copy this one again.",
        )


def _problems(checkpoint: Path, values: dict[str, Any]) -> list[str]:
    """List what is wrong with the contents of a mark, and with the files that it lists."""
    files, step, named = values.get("files"), values.get("step"), step_of(checkpoint.name)
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        return [f"{MARK}: format {values.get('format')!r}, version {values.get('version')!r}"]
    if not (is_sealed(values) and isinstance(step, int) and isinstance(files, dict)):
        return [f"{MARK}: does not match its checksum"]
    other = named is not None and named != step
    wrong = [f"{MARK}: is of step {step}, in a folder of step {named}"] if other else []
    return wrong + array_store.listed_problems(checkpoint, files)
