"""The chat templates of a model folder: where they are, and which one is used.

chat_template.jinja                    the template "default"
additional_chat_templates/NAME.jinja   the template NAME
tokenizer_config.json                  a string ("default"), or a list of {"name", "template"}
chat_template.json                     the same, in the folders of processors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_lora.data.special_tokens import SETTINGS, read_settings
from jax_lora.errors import ConfigError, LoraError, ModelError
from jax_lora.storage import schema
from jax_lora.storage.json_files import read_limited
from jax_lora.storage.safe_paths import contained

DEFAULT, TOOLS = "default", "tool_use"
FILE, FOLDER, SUFFIX = "chat_template.jinja", "additional_chat_templates", ".jinja"
_OLDER = "chat_template.json"
_MOST_FILES = 100
_NAMED = schema.fields(
    {"name": schema.TEXT, "template": schema.TEXT}, required=("name", "template")
)
_TEMPLATES = schema.fields(
    {"chat_template": schema.optional(schema.either(schema.TEXT, schema.list_of(_NAMED)))}
)


def read_templates(folder: Path) -> dict[str, str]:
    """Read the chat templates of a folder by name; a file comes before the settings.

    Raises:
      ModelError: A file is damaged or too large.
    """
    inside = _inside(folder / SETTINGS) or _inside(folder / _OLDER)
    return inside | template_files(folder)


def template_files(folder: Path) -> dict[str, str]:
    """Read the chat templates that have a file for themselves, by name.

    Raises:
      ModelError: A file is too large or not UTF-8, is a link that leaves the folder, or there are
        too many.
    """
    files = {DEFAULT: folder / FILE} if (folder / FILE).is_file() else {}
    additional = sorted((folder / FOLDER).glob(f"*{SUFFIX}"))
    if len(additional) > _MOST_FILES:
        raise ModelError(
            str(folder / FOLDER),
            got=f"{len(additional)} chat templates",
            expected=f"at most {_MOST_FILES}",
            fix="Move those that are not used out of the folder.",
        )
    for file in additional:
        files[file.name.removesuffix(SUFFIX)] = contained(folder / FOLDER, file.name, ModelError)
    return {name: read_template(file, ModelError) for name, file in files.items()}


def read_template(file: Path, error: type[LoraError]) -> str:
    """Read a file with a template.

    Args:
      file: The file.
      error: Class of the exception to raise.

    Returns:
      Its text.

    Raises:
      LoraError: An `error`, if the file is absent, too large, or not UTF-8.
    """
    try:
        if not file.is_file():
            raise FileNotFoundError("no such file")
        text = read_limited(file, error, "template_bytes").decode("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(
            str(file),
            got=str(cause)[:200],
            expected="a template, in UTF-8",
            fix="Check the path, and that the file is complete.",
        ) from cause
    return text.replace("\r\n", "\n")


def choose_template(folder: Path, choice: str) -> str:
    """Return the chat template that a user chose.

    Args:
      folder: The model's folder.
      choice: A file that ends in `.jinja`, or the name of one of the folder's templates.

    Returns:
      The template.

    Raises:
      ConfigError: There is no such file or name; the message lists the names.
      ModelError: A file of the folder is damaged.
    """
    if choice.endswith(SUFFIX):
        return read_template(Path(choice), ConfigError)
    templates = read_templates(folder)
    if choice not in templates:
        named, fix = "a template's name", f"Give a file: {folder} has no chat template."
        if names := ", ".join(sorted(templates)):
            named = f"one of the templates of {folder}: {names}"
            fix = "Choose one of these names, or give a file."
        expected = f"a file that ends in {SUFFIX}, or {named}"
        raise ConfigError("chat_template", got=repr(choice), expected=expected, fix=fix)
    return templates[choice]


def source_of(folder: Path) -> Path:
    """Return the file with a folder's default template, or the folder."""
    files = (folder / name for name in (FILE, SETTINGS, _OLDER))
    return next((file for file in files if file.is_file()), folder)


def _inside(file: Path) -> dict[str, str]:
    found: Any = read_settings(file, _TEMPLATES).get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    return {each["name"]: each["template"] for each in found or ()}
