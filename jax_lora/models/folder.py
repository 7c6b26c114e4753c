"""Safe reading of a model folder from an untrusted source.

A folder's index chooses file names, and its files may be links. Nothing here opens a file outside
the folder, parses a file of unbounded size, or reads a format that can contain code.
"""

from pathlib import Path
from typing import Any

from jax_lora.errors import ModelError
from jax_lora.models.model_errors import raise_model_error
from jax_lora.storage.json_files import parse_object, read_limited
from jax_lora.storage.pickled_weights import conversion_command, pickle_names
from jax_lora.storage.safe_paths import contained

__all__ = ["member", "read_json", "read_text", "weight_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def member(folder: Path, name: str) -> Path:
    """Return the path of `folder`'s file `name`, without opening it.

    Raises:
      ModelError: If the name is not a plain file name, or is a link that leaves the folder.
    """
    return contained(folder, name, ModelError)


def read_json(folder: Path, name: str, size: str = "config_bytes") -> dict[str, Any]:
    """Read the JSON object in `folder`'s file `name`.

    Args:
      folder: The model folder.
      name: A plain file name.
      size: Name of the limit on the size of the file.

    Raises:
      ModelError: If the file is absent, too large or nested too deeply, or not a JSON object, or if
        it has duplicate keys or numbers that are not finite.
    """
    return parse_object(_read(folder, name, size), member(folder, name), ModelError)


def read_text(folder: Path, name: str, size: str = "config_bytes") -> str:
    """Read the text of `folder`'s file `name`.

    Args:
      folder: The model folder.
      name: A plain file name.
      size: Name of the limit on the size of the file.

    Raises:
      ModelError: If the file is absent, too large, or not UTF-8.
    """
    try:
        return _read(folder, name, size).decode("utf-8")
    except UnicodeDecodeError as error:
        path = member(folder, name)
        raise_model_error(path, f"broken text: {error}", "UTF-8", "download the file again.")


def _read(folder: Path, name: str, size: str) -> bytes:
    path = member(folder, name)
    if not path.is_file():
        raise_model_error(path, "no such file", "a Hugging Face model folder", "check the path.")
    return read_limited(path, ModelError, size)


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """List the safetensors files of a folder, each with the tensors expected in it (None: any).

    Raises:
      ModelError: If there are none. Pickle files are never opened.
    """
    if (folder / _SINGLE).exists():
        member(folder, _SINGLE)
        return {_SINGLE: None}
    if (folder / _INDEX).exists():
        return _from_index(folder)
    pickles = pickle_names(file.name for file in folder.glob("*"))
    got, fix = "neither", "check the path."
    if pickles:
        got = f"only pickle files, {', '.join(pickles)}, which can run code"
        command = conversion_command(folder, pickles, _SINGLE)
        fix = f"save the model in the safetensors format, where torch is installed:\n    {command}"
    raise_model_error(folder, got, f"{_SINGLE} or {_INDEX}", fix)


def _from_index(folder: Path) -> dict[str, set[str] | None]:
    weight_map = read_json(folder, _INDEX, "index_bytes").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        where = folder / _INDEX
        raise_model_error(
            where, "no weight_map", "tensor name -> file name", "download the file again."
        )
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name not in files:
            path = member(folder, name)
            if path.suffix != ".safetensors" or not path.is_file():
                raise_model_error(
                    path, "no such safetensors file", "a shard", "download the missing shard."
                )
        files.setdefault(name, set()).add(tensor)
    return dict(files)
