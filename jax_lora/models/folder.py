"""Reading a model folder that a stranger may have made.

A folder's index chooses file names, and its files may be links. Nothing here opens a file that does
not lie in the folder, parses a file of unbounded size, or reads a format that can carry code.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from jax_lora.errors import ModelError, format_error
from jax_lora.storage.safe_paths import contained

__all__ = ["member", "read_json", "read_text", "weight_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def member(folder: Path, name: str) -> Path:
    """The path of `folder`'s own file `name`; nothing is opened.

    Raises:
      ModelError: if the name is no plain file name, or is a link that leaves the folder.
    """
    return contained(folder, name, ModelError)


def read_json(folder: Path, name: str, limit: int = 1 << 20) -> dict[str, Any]:
    """The object in `folder`'s file `name`.

    Args:
      folder: the model folder.
      name: a plain file name.
      limit: the largest size, in bytes, that is parsed.

    Raises:
      ModelError: if the file is absent, larger than `limit`, or holds no JSON object; keys that
        occur twice and numbers that are not finite are refused too.
    """
    path, text = member(folder, name), read_text(folder, name, limit)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        _refuse(path, f"broken JSON: {reason}", "a JSON object", "fetch the file again.")
    if not isinstance(value, dict):
        _refuse(path, type(value).__name__, "a JSON object", "fetch the file again.")
    return value


def read_text(folder: Path, name: str, limit: int = 1 << 20) -> str:
    """The text of `folder`'s file `name`.

    Args:
      folder: the model folder.
      name: a plain file name.
      limit: the largest size, in bytes, that is read.

    Raises:
      ModelError: if the file is absent, larger than `limit`, or not UTF-8.
    """
    path = member(folder, name)
    if not path.is_file():
        _refuse(path, "no such file", "a Hugging Face model folder", "check the path.")
    size = path.stat().st_size
    if size > limit:
        _refuse(path, f"{size} bytes", f"at most {limit}", "check that this is the right file.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, f"broken text: {error}", "UTF-8", "fetch the file again.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return result


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The safetensors files of a folder -> the tensors expected there (None: any).

    Raises:
      ModelError: if there are none; a folder with only pickle files is refused unopened.
    """
    if (folder / _SINGLE).exists():
        member(folder, _SINGLE)
        return {_SINGLE: None}
    if (folder / _INDEX).exists():
        return _from_index(folder)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    got = f"only pickle files, {', '.join(pickles)}, which can run code" if pickles else "neither"
    _refuse(
        folder,
        got,
        f"{_SINGLE} or {_INDEX}",
        "save the model in the safetensors format." if pickles else "check the path.",
    )


def _from_index(folder: Path) -> dict[str, set[str] | None]:
    weight_map = read_json(folder, _INDEX, limit=1 << 25).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        where = folder / _INDEX
        _refuse(where, "no weight_map", "tensor name -> file name", "fetch the file again.")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if name not in files:
            path = member(folder, name)
            if path.suffix != ".safetensors" or not path.is_file():
                _refuse(path, "no such safetensors file", "a shard", "fetch the missing shard.")
        files.setdefault(name, set()).add(tensor)
    return dict(files)


def _refuse(where: Path, got: str, expected: str, fix: str) -> NoReturn:
    raise ModelError(format_error(str(where), got=got, expected=expected, fix=fix))
