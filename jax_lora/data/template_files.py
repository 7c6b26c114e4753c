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
from jax_lora.errors import ConfigError, LoraError, ModelError, format_error
from jax_lora.storage import schema
from jax_lora.storage.json_files import read_limited
from jax_lora.storage.limits import limit, raise_hint
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
    """Read the chat templates of a folder by name.

    Args:
      folder: The model's folder.

    Returns:
      The templates; that of a file comes before that of the settings of the same name.

    Raises:
      ModelError: A file is damaged or too large.
    """
    inside = _inside(folder / SETTINGS) or _inside(folder / _OLDER)
    return inside | template_files(folder)


def template_files(folder: Path) -> dict[str, str]:
    """Read the chat templates that have a file for themselves, by name.

    Args:
      folder: The model's folder.

    Returns:
      The templates.

    Raises:
      ModelError: A file is too large or not UTF-8, is a link that leaves the folder, or there are
        too many.
    """
    files = {DEFAULT: folder / FILE} if (folder / FILE).is_file() else {}
    additional = sorted((folder / FOLDER).glob(f"*{SUFFIX}"))
    if len(additional) > _MOST_FILES:
        raise ModelError(
            format_error(
                str(folder / FOLDER),
                got=f"{len(additional)} chat templates",
                expected=f"at most {_MOST_FILES}",
                fix="Move those that are not used out of the folder.",
            )
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
            format_error(
                str(file),
                got=str(cause)[:200],
                expected="a template, in UTF-8",
                fix="Check the path, and that the file is complete.",
            )
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
        names = ", ".join(sorted(templates))
        raise ConfigError(
            format_error(
                "chat_template",
                got=repr(choice),
                expected=f"a file that ends in {SUFFIX}, or "
                + (f"one of the templates of {folder}: {names}" if names else "a template's name"),
                fix="Choose one of these names, or give a file."
                if names
                else f"Give a file: {folder} has no chat template.",
            )
        )
    return templates[choice]


def source_of(folder: Path) -> Path:
    """Return the file with a folder's default template, or the folder."""
    files = (folder / name for name in (FILE, SETTINGS, _OLDER))
    return next((file for file in files if file.is_file()), folder)


def check_template_size(where: str, template: str) -> None:
    """Raise `ModelError` if a template is larger than the limit `template_bytes`."""
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > limit("template_bytes"):
        raise ModelError(
            format_error(
                where,
                got=f"{size:,} bytes",
                expected=f"at most {limit('template_bytes'):,}",
                fix=raise_hint("template_bytes"),
            )
        )


def _inside(file: Path) -> dict[str, str]:
    found: Any = read_settings(file, _TEMPLATES).get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    return {each["name"]: each["template"] for each in found or ()}
