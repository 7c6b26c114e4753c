"""Safe reading of a model folder from an untrusted source.

A folder's index chooses file names, and its files may be links. Nothing here opens a file outside
the folder, parses a file of unbounded size, or reads a format that can contain code.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from jax_lora.errors import ModelError
from jax_lora.models.model_errors import raise_model_error
from jax_lora.storage.safe_paths import contained

__all__ = ["member", "read_json", "read_text", "weight_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def member(folder: Path, name: str) -> Path:
    """Return the path of `folder`'s file `name`, without opening it.

    Raises:
      ModelError: If the name is not a plain file name, or is a link that leaves the folder.
    """
    return contained(folder, name, ModelError)


def read_json(folder: Path, name: str, limit: int = 1 << 20) -> dict[str, Any]:
    """Read the JSON object in `folder`'s file `name`.

    Args:
      folder: The model folder.
      name: A plain file name.
      limit: The largest file that is parsed, in bytes.

    Raises:
      ModelError: If the file is absent, larger than `limit`, or not a JSON object, or if it has
        duplicate keys or numbers that are not finite.
    """
    path, text = member(folder, name), read_text(folder, name, limit)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise_model_error(
            path, f"broken JSON: {reason}", "a JSON object", "download the file again."
        )
    if not isinstance(value, dict):
        raise_model_error(path, type(value).__name__, "a JSON object", "download the file again.")
    return value


def read_text(folder: Path, name: str, limit: int = 1 << 20) -> str:
    """Read the text of `folder`'s file `name`.

    Args:
      folder: The model folder.
      name: A plain file name.
      limit: The largest file that is read, in bytes.

    Raises:
      ModelError: If the file is absent, larger than `limit`, or not UTF-8.
    """
    path = member(folder, name)
    if not path.is_file():
        raise_model_error(path, "no such file", "a Hugging Face model folder", "check the path.")
    size = path.stat().st_size
    if size > limit:
        raise_model_error(
            path, f"{size} bytes", f"at most {limit}", "check that this is the right file."
        )
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise_model_error(path, f"broken text: {error}", "UTF-8", "download the file again.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return result


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


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
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    got, fix = "neither", "check the path."
    if pickles:
        got = f"only pickle files, {', '.join(pickles)}, which can run code"
        fix = "save the model in the safetensors format."
    raise_model_error(folder, got, f"{_SINGLE} or {_INDEX}", fix)


def _from_index(folder: Path) -> dict[str, set[str] | None]:
    weight_map = read_json(folder, _INDEX, limit=1 << 25).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        where = folder / _INDEX
        raise_model_error(
            where, "no weight_map", "tensor name -> file name", "download the file again."
        )
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if name not in files:
            path = member(folder, name)
            if path.suffix != ".safetensors" or not path.is_file():
                raise_model_error(
                    path, "no such safetensors file", "a shard", "download the missing shard."
                )
        files.setdefault(name, set()).add(tensor)
    return dict(files)
