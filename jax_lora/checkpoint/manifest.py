"""adapter.json: the manifest of a saved adapter, and the checks against it.

The arrays are in an Orbax checkpoint under generated names (`0000/a`), so that a path from an
untrusted file is never used as a file name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.checkpoint.fingerprint import LeafPrint
from jax_lora.config import LoraConfig
from jax_lora.errors import CheckpointError, ConfigError, format_error
from jax_lora.storage import schema
from jax_lora.storage.json_files import digest, read_json
from jax_lora.updates import LoraPair, TokenRows
from jax_lora.updates.pair import VECTORS

FORMAT = "jax_lora adapter"
VERSION = 3
# Version 1 has no ranks per layer and only LoRA factors. Up to version 2, a config has the field
# `peft_config` instead of `metadata`.
_READABLE = (1, 2, 3)

_ARRAYS_NAME = re.compile(r"arrays-[0-9a-f]{12}")
_MOST_BYTES = 2**38  # a manifest that declares more than 256 GiB is damaged or malicious
_SHOWN_PROBLEMS = 10

_SIZES = schema.list_of(schema.integer(0, 2**40 - 1))
_LEAF = schema.fields(
    {"shape": _SIZES, "dtype": schema.TEXT, "checksum": schema.TEXT},
    required=("shape", "dtype", "checksum"),
)
_AXES = ("in_axes", "out_axes", "stack_axes")
_PAIR = schema.fields(
    {
        **dict.fromkeys(("a", "b", *VECTORS), _LEAF),
        **dict.fromkeys(_AXES, _SIZES),
        "scale": schema.either(schema.NUMBER, schema.list_of(schema.ANYTHING)),
        "ranks": schema.optional(schema.list_of(schema.ANYTHING)),
    },
    required=("a", "b", *_AXES, "scale"),
)
_ROWS = schema.fields({"values": _LEAF, "indices": _SIZES}, required=("values", "indices"))
_PRINT = schema.fields(
    {"shape": _SIZES, "dtype": schema.TEXT, "sample": schema.optional(schema.TEXT)},
    required=("shape", "dtype", "sample"),
)
_FIELDS = schema.fields(
    {
        "config": schema.OBJECT,
        "pairs": schema.object_of(_PAIR),
        "whole": schema.object_of(_LEAF),
        "rows": schema.object_of(_ROWS),
        "arrays": schema.TEXT,
        "files": schema.object_of(schema.TEXT),
        "base": schema.optional(schema.object_of(_PRINT)),
    },
    required=("config", "pairs", "whole", "arrays", "files", "base"),
)


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """Shape, type and checksum of one array.

    Args:
      shape: Shape of the array.
      dtype: Name of its type.
      checksum: Hash of its bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: str

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return int(np.prod(self.shape, dtype=object)) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of adapter.json.

    Args:
      config: The configuration of the adapter.
      adapter: The adapter, with a `LeafRecord` instead of each array.
      arrays: Name of the folder with the arrays.
      files: Checksums of the files in that folder.
      base: Fingerprint of the base model, or None.
    """

    config: LoraConfig
    adapter: Adapter
    arrays: str
    files: Mapping[str, str]
    base: Mapping[str, LeafPrint] | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values with a checksum of these values."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_dict(),
            "pairs": {path: _pair_to_dict(pair) for path, pair in self.adapter.pairs.items()},
            "whole": {path: dataclasses.asdict(leaf) for path, leaf in self.adapter.whole.items()},
            "rows": {path: _rows_to_dict(rows) for path, rows in self.adapter.rows.items()},
            "arrays": self.arrays,
            "files": dict(self.files),
            "base": self.base
            and {path: dataclasses.asdict(leaf) for path, leaf in self.base.items()},
        }
        return values | {"seal": digest(values)}


def array_tree(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Return the arrays of an adapter by their generated names."""
    pairs = [pair.arrays for _, pair in sorted(adapter.pairs.items())]
    whole = [{"value": leaf} for _, leaf in sorted(adapter.whole.items())]
    rows = [{"values": rows.values} for _, rows in sorted(adapter.rows.items())]
    return {f"{index:04d}": leaves for index, leaves in enumerate([*pairs, *whole, *rows])}


def from_array_tree(adapter: Adapter, arrays: Mapping[str, Mapping[str, Any]]) -> Adapter:
    """Replace the leaves of an adapter: the inverse of `array_tree`."""
    items = iter([arrays[name] for name in sorted(arrays, key=int)])
    pairs = {
        path: dataclasses.replace(pair, **next(items))
        for path, pair in sorted(adapter.pairs.items())
    }
    whole = {path: next(items)["value"] for path in sorted(adapter.whole)}
    rows = {
        path: dataclasses.replace(rows, **next(items))
        for path, rows in sorted(adapter.rows.items())
    }
    return Adapter(pairs, whole, adapter.config, rows)


def record(array: np.ndarray) -> LeafRecord:
    """Return the record of an array."""
    data = np.ascontiguousarray(array).tobytes()
    checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
    return LeafRecord(tuple(array.shape), str(array.dtype), checksum)


def named_leaves(adapter: Adapter) -> dict[str, Any]:
    """Return the leaves of an adapter by their names in messages: `path: a`, `path: b`, `path`."""
    leaves = {}
    for path, pair in adapter.pairs.items():
        leaves |= {f"{path}: {name}": array for name, array in pair.arrays.items()}
    rows = {f"{path}: rows": rows.values for path, rows in adapter.rows.items()}
    return leaves | dict(adapter.whole) | rows


# -----------------------------------------------------------------------------------------------
# Reading
# -----------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    """Read and validate adapter.json.

    Args:
      path: The file.

    Returns:
      The manifest.

    Raises:
      CheckpointError: The file is missing or is not JSON, has another format, a newer version or a
        wrong checksum, or its values do not describe an adapter.
    """
    values = read_json(path, CheckpointError)
    if values.get("format") != FORMAT:
        raise _broken(path, f"format {values.get('format')!r}", repr(FORMAT))
    if values.get("version") not in _READABLE:
        expected = f"version {VERSION} or earlier"
        raise _broken(path, f"format version {values.get('version')!r}", expected)
    sealed = {key: value for key, value in values.items() if key != "seal"}
    if digest(sealed) != values.get("seal"):
        raise _broken(path, "contents that do not match their checksum", "an unchanged file")
    if wrong := list(schema.problems(values, _FIELDS)):
        raise _broken(path, wrong[:_SHOWN_PROBLEMS], "the description of an adapter")
    try:
        return _from_dict(values)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        reason = (
            str(cause) if isinstance(cause, ConfigError) else f"{type(cause).__name__}: {cause}"
        )
        got = f"values that do not describe an adapter ({reason})"
        raise _broken(path, got, "an unchanged file") from cause


def _broken(path: Path, got: str | list[str], expected: str) -> CheckpointError:
    fix = "Copy the folder again, or load it with the version of jax_lora that saved it."
    return CheckpointError(format_error(str(path), got=got, expected=expected, fix=fix))


def _from_dict(values: dict[str, Any]) -> Manifest:
    config = LoraConfig.from_dict(_current_config(values["config"], values["version"]))
    pairs = {path: _pair_from_dict(item) for path, item in values["pairs"].items()}
    whole = {path: _leaf_from_dict(item) for path, item in values["whole"].items()}
    rows = {path: _rows_from_dict(item) for path, item in values.get("rows", {}).items()}
    adapter = Adapter(pairs, whole, config, rows)
    if sum(leaf.nbytes for leaf in named_leaves(adapter).values()) > _MOST_BYTES:
        raise ValueError(f"arrays of more than {_MOST_BYTES} bytes")
    if not _ARRAYS_NAME.fullmatch(values["arrays"]):
        raise ValueError(f"a folder named {values['arrays']!r}")
    files = {_inside(name): checksum for name, checksum in values["files"].items()}
    base = values["base"] and {
        path: LeafPrint(tuple(item["shape"]), item["dtype"], item["sample"])
        for path, item in values["base"].items()
    }
    return Manifest(config, adapter, values["arrays"], files, base)


def _current_config(settings: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Convert the settings of an earlier version."""
    settings = dict(settings)
    text = settings.pop("peft_config", "") if version < 3 else ""
    return {**settings, "metadata": {"peft": text}} if text else settings


def _inside(name: str) -> str:
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"a file named {name!r}")
    return name


def _pair_to_dict(pair: LoraPair) -> dict[str, Any]:
    return {
        **{name: dataclasses.asdict(array) for name, array in pair.arrays.items()},
        "in_axes": list(pair.in_axes),
        "out_axes": list(pair.out_axes),
        "stack_axes": list(pair.stack_axes),
        "scale": pair.scale,  # nested tuples become nested lists
        "ranks": pair.ranks,
    }


def _pair_from_dict(item: dict[str, Any]) -> LoraPair:
    axes = [tuple(item[name]) for name in _AXES]
    pair = LoraPair(_leaf_from_dict(item["a"]), _leaf_from_dict(item["b"]), *axes)
    inputs, outputs, stack = map(len, axes)
    if sorted(sum(axes, ())) != list(range(inputs + outputs + stack)):
        raise ValueError(f"axes {axes}")
    a, b = pair.a.shape, pair.b.shape
    fits = len(a) == stack + inputs + 1 and len(b) == stack + 1 + outputs
    if not fits or a[:stack] != b[:stack] or a[-1] != b[stack]:
        raise ValueError(f"factors of shapes {a} and {b}")
    scale, ranks = _nested(item["scale"], a[:stack], "scale"), item.get("ranks")
    if ranks is not None:
        ranks = _ranks(ranks, a[:stack], a[-1])
    pair = dataclasses.replace(pair, scale=scale, ranks=ranks)
    vectors = {name: _leaf_from_dict(item[name]) for name in VECTORS if name in item}
    for name, leaf in vectors.items():
        if leaf.shape != (*a[:stack], *b[stack + 1 :]):
            raise ValueError(f"a {name} of shape {leaf.shape} for factors of shapes {a} and {b}")
    return dataclasses.replace(pair, **vectors)


def _rows_to_dict(rows: TokenRows) -> dict[str, Any]:
    return {"values": dataclasses.asdict(rows.values), "indices": list(rows.indices)}


def _rows_from_dict(item: dict[str, Any]) -> TokenRows:
    rows = TokenRows(_leaf_from_dict(item["values"]), tuple(item["indices"]))
    vocab = max(rows.indices, default=-1) + 1  # the size of the table is checked with the base
    if (why := rows.problem((vocab, *rows.values.shape[1:]))) is not None:
        raise ValueError(why)
    return rows


def _nested(value: Any, stack: tuple[int, ...], what: str) -> Any:
    """Read a number, or nested lists of numbers of the shape of the stack."""
    if isinstance(value, list):
        if np.shape(value) != stack:
            raise ValueError(f"{what}s of shape {np.shape(value)} for a stack of shape {stack}")
        return tuple(_nested(each, stack[1:], what) for each in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a {what} of {value!r}")
    return value


def _ranks(value: Any, stack: tuple[int, ...], rank: int) -> tuple[Any, ...]:
    ranks = _nested(value, stack, "rank")
    each = np.asarray(ranks)
    if not isinstance(ranks, tuple) or each.dtype.kind != "i" or not (0 <= each).all():
        raise TypeError(f"{value!r} for the ranks of layers")
    if each.max() > rank:
        raise ValueError(f"a rank of {each.max()} in factors of rank {rank}")
    return ranks


def _leaf_from_dict(item: dict[str, Any]) -> LeafRecord:
    dtype = jnp.dtype(item["dtype"])
    if not jnp.issubdtype(dtype, np.number) and dtype != np.bool_:
        raise TypeError(f"the type {dtype}")
    return LeafRecord(tuple(item["shape"]), dtype.name, item["checksum"])


def leaf_problems(adapter: Adapter, arrays: Adapter) -> list[str]:
    """Check arrays against the manifest.

    Args:
      adapter: The adapter of `LeafRecord`s.
      arrays: The adapter of arrays, or of `jax.ShapeDtypeStruct`s.

    Returns:
      A line for every leaf with another shape, type or checksum, or with NaN or Inf.
    """
    problems = []
    have = named_leaves(arrays)
    for name, want in named_leaves(adapter).items():
        leaf = have[name]
        if tuple(leaf.shape) != want.shape or str(leaf.dtype) != want.dtype:
            problems.append(
                f"{name} has shape {tuple(leaf.shape)} and type {leaf.dtype}, "
                f"was saved with {want.shape} and {want.dtype}"
            )
        elif isinstance(leaf, np.ndarray) and record(leaf).checksum != want.checksum:
            problems.append(f"{name} does not match its checksum")
        elif isinstance(leaf, np.ndarray) and (bad := count_not_finite(leaf)):
            problems.append(f"{name} has {bad} elements that are NaN or Inf")
    return problems


def count_not_finite(array: Any) -> int:
    """Count NaN and Inf in an array of any type."""
    if not jnp.issubdtype(array.dtype, np.inexact):
        return 0
    return int(np.sum(~np.isfinite(np.asarray(array))))


def abstract(adapter: Adapter) -> Adapter:
    """Convert `LeafRecord`s to `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), adapter)
