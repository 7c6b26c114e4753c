"""Safe reading of a model folder from an untrusted source.

A folder's index chooses file names, and its files may be links. Nothing here opens a file outside
the folder, parses a file of unbounded size, or reads a format that can contain code.
"""

from pathlib import Path
from typing import Any

from jax_lora.errors import ModelError
from jax_lora.hub.repository_files import INDEX, SINGLE
from jax_lora.storage.json_files import parse_object, read_limited
from jax_lora.storage.pickled_weights import conversion_command, pickle_names
from jax_lora.storage.safe_paths import contained


def read_json(folder: Path, name: str, size: str = "config_bytes") -> dict[str, Any]:
    """Read the JSON object in `folder`'s file `name`; `size` is the name of the limit on its size.

    Raises:
      ModelError: If the file is absent, too large or nested too deeply, or not a JSON object, or if
        it has duplicate keys or numbers that are not finite.
    """
    return parse_object(read_file(folder, name, size), folder / name, ModelError)


def read_file(folder: Path, name: str, size: str = "config_bytes") -> bytes:
    """Read `folder`'s file `name`.

    Raises:
      ModelError: If the file is absent, too large, or a link that leaves the folder.
    """
    path = contained(folder, name, ModelError)
    if not path.is_file():
        raise ModelError(
            path, got="no such file", expected="a Hugging Face model folder", fix="check the path."
        )
    return read_limited(path, ModelError, size)


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """List the safetensors files of a folder, each with the tensors expected in it (None: any).

    Raises:
      ModelError: If there are none. Pickle files are never opened.
    """
    if (folder / SINGLE).exists():
        contained(folder, SINGLE, ModelError)
        return {SINGLE: None}
    if (folder / INDEX).exists():
        return _from_index(folder)
    pickles = pickle_names(file.name for file in folder.glob("*"))
    got, fix = "neither", "check the path."
    if pickles:
        got = f"only pickle files, {', '.join(pickles)}, which can run code"
        command = conversion_command(folder, pickles, SINGLE)
        fix = f"save the model in the safetensors format, where torch is installed:\n    {command}"
    raise ModelError(folder, got=got, expected=f"{SINGLE} or {INDEX}", fix=fix)


def _from_index(folder: Path) -> dict[str, set[str] | None]:
    weight_map = read_json(folder, INDEX, "index_bytes").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        got, fix = "no weight_map", "download the file again."
        raise ModelError(folder / INDEX, got=got, expected="tensor name -> file name", fix=fix)
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name not in files:
            path = contained(folder, name, ModelError)
            if path.suffix != ".safetensors" or not path.is_file():
                got, fix = "no such safetensors file", "download the missing shard."
                raise ModelError(path, got=got, expected="a shard", fix=fix)
        files.setdefault(name, set()).add(tensor)
    return dict(files)
