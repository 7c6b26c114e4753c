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

from jax_lora.errors import CheckpointError, format_error
from jax_lora.storage import array_store
from jax_lora.storage.atomic_writes import write_file
from jax_lora.storage.json_files import json_checksum, read_json
from jax_lora.storage.locks import LOCK

MARK, FORMAT, VERSION = "commit.json", "jax_lora checkpoint", 1
STEP = re.compile(r"step-(\d{6,})")
_ELSEWHERE = re.compile(r"(moments|arrays-[0-9a-f]{12})/.*")


def write_mark(checkpoint: Path, step: int) -> None:
    """Mark a checkpoint as complete.

    Args:
      checkpoint: The folder with all its files.
      step: Updates made.

    Raises:
      CheckpointError: Writing fails.
    """
    values = {"format": FORMAT, "version": VERSION, "step": step, "files": _digests(checkpoint)}
    text = json.dumps(values | {"seal": json_checksum(values)}, indent=1) + "\n"
    write_file(checkpoint / MARK, text, CheckpointError)


def _digests(checkpoint: Path) -> dict[str, str]:
    skipped = (MARK, LOCK)
    return {
        name: checksum
        for name, checksum in array_store.checksums(checkpoint).items()
        if name not in skipped and not _ELSEWHERE.fullmatch(name)
    }


def check_mark(checkpoint: Path, *, required: bool = False) -> None:
    """Check the mark of a checkpoint, and the files that it lists.

    Args:
      checkpoint: The folder. In a folder that is named for a step, the mark must be of that step.
      required: Whether a checkpoint without a mark, as earlier versions wrote them, is refused.

    Raises:
      CheckpointError: The mark or a listed file is missing or changed, or belongs to another
        checkpoint. One message names all such files.
    """
    if not (checkpoint / MARK).is_file():
        if required:
            raise _refusal(checkpoint, [f"no {MARK}, which a complete checkpoint has"])
        return
    values = read_json(checkpoint / MARK, CheckpointError)
    problems = _seal_problems(values) or [
        *_step_problems(checkpoint, values["step"]),
        *array_store.listed_problems(checkpoint, values["files"]),
    ]
    if problems:
        raise _refusal(checkpoint, problems)


def _seal_problems(values: dict[str, Any]) -> list[str]:
    inside = {key: value for key, value in values.items() if key != "seal"}
    files = values.get("files")
    whole = isinstance(values.get("step"), int) and isinstance(files, dict)
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        return [f"{MARK}: format {values.get('format')!r}, version {values.get('version')!r}"]
    if values.get("seal") != json_checksum(inside) or not whole:
        return [f"{MARK}: does not match its checksum"]
    return []


def _step_problems(checkpoint: Path, step: int) -> list[str]:
    named = STEP.fullmatch(checkpoint.name)
    if named is None or int(named[1]) == step:
        return []
    return [f"{MARK}: is of step {step}, in a folder of step {int(named[1])}"]


def _refusal(checkpoint: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        format_error(
            str(checkpoint),
            got=problems,
            expected="the files of one checkpoint, unchanged since it was saved",
            fix="Use another checkpoint of the run, or copy this one again.",
        )
    )
