"""The chat template of a run: a copy in the run's folder, with its digest in a comment."""

from __future__ import annotations

import re
from pathlib import Path

from jax_lora.data.template_files import FILE, read_template
from jax_lora.errors import CheckpointError
from jax_lora.finetune.run_folder import is_run, text_digest
from jax_lora.storage.atomic_writes import write_file

_SEAL = re.compile(r"\{# seal: ([0-9a-f]{32}) #\}\n\Z")


def write_run_template(run: Path, template: str) -> None:
    """Write the chat template of a run into its folder.

    Raises:
      CheckpointError: The file cannot be written.
    """
    text = f"{template}{{# seal: {text_digest(template)} #}}\n"
    write_file(run / FILE, text, CheckpointError)


def read_run_template(run: Path) -> str | None:
    """Read the chat template of a run from its folder.

    Returns:
      The template, or None if the run uses that of its model.

    Raises:
      CheckpointError: The file is not the one that the run wrote.
    """
    file = run / FILE
    if not file.is_file() or not is_run(run):
        return None
    text = read_template(file, CheckpointError)
    seal = _SEAL.search(text)
    template = text[: seal.start()] if seal else text
    if seal is None or seal[1] != text_digest(template):
        raise CheckpointError(
            str(file),
            got="a chat template that was edited after the run wrote it",
            expected="the chat template that the run was trained with",
            fix="Restore the file. To use another template, set chat_template to a .jinja file "
            "outside the run.",
        )
    return template
