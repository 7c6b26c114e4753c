"""adapter.json: the manifest of a saved adapter, and the checks against it.

The arrays are in an Orbax checkpoint under generated names (`0000/a`), so that a path from an
untrusted file is never used as a file name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.checkpoint.fingerprint import LeafFingerprint
from jax_lora.config import LoraConfig
from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.storage import schema
from jax_lora.storage.json_files import is_sealed, read_json, sealed
from jax_lora.updates import LoraPair, TokenRows
from jax_lora.updates.pair import VECTORS

FORMAT = "jax_lora adapter"
VERSION = 3
# Version 1 has no ranks per layer and only LoRA factors. Up to version 2, a config has the field
# `peft_config` instead of `metadata`.
_READABLE_VERSIONS = (1, 2, 3)

_ARRAYS_NAME = re.compile(r"arrays-[0-9a-f]{12}")
_MAX_BYTES = 2**38  # a manifest that declares more than 256 GiB is damaged or malicious
_MAX_SHOWN_PROBLEMS = 10

_SIZES = schema.list_of(schema.integer(0, 2**40 - 1))
_LEAF = schema.record({"shape": _SIZES, "dtype": schema.TEXT, "checksum": schema.TEXT})
_AXES = ("in_axes", "out_axes", "stack_axes")
_PAIR = schema.record(
    {
        **dict.fromkeys(("a", "b", *VECTORS), _LEAF),
        **dict.fromkeys(_AXES, _SIZES),
        "scale": schema.either(schema.NUMBER, schema.list_of(schema.ANYTHING)),
        "ranks": schema.optional(schema.list_of(schema.ANYTHING)),
    },
    optional=(*VECTORS, "ranks"),
)
_ROWS = schema.record({"values": _LEAF, "indices": _SIZES})
_FINGERPRINT = schema.record(
    {"shape": _SIZES, "dtype": schema.TEXT, "sample": schema.optional(schema.TEXT)}
)
_FIELDS = schema.record(
    {
        "config": schema.OBJECT,
        "pairs": schema.object_of(_PAIR),
        "whole": schema.object_of(_LEAF),
        "rows": schema.object_of(_ROWS),
        "arrays": schema.TEXT,
        "files": schema.object_of(schema.TEXT),
        "base": schema.optional(schema.object_of(_FINGERPRINT)),
    },
    optional=("rows",),
)


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """Shape, name of the dtype, and hash of the bytes of one array."""

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

    In the file, `whole` are the fully trained leaves (`modules_to_save`), `rows` the trained rows
    of token embeddings, and `seal` is a checksum of all other fields.
    """

    config: LoraConfig
    adapter: Adapter  # with a `LeafRecord` instead of each array
    arrays: str  # name of the folder with the arrays
    files: Mapping[str, str]  # checksums of the files in that folder
    base: Mapping[str, LeafFingerprint] | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values with a checksum of these values."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_dict(),
            "pairs": {path: _pair_to_dict(pair) for path, pair in self.adapter.pairs.items()},
            "whole": _as_dicts(self.adapter.whole),
            "rows": {path: _rows_to_dict(rows) for path, rows in self.adapter.rows.items()},
            "arrays": self.arrays,
            "files": dict(self.files),
            "base": None if self.base is None else _as_dicts(self.base),
        }
        return sealed(values)


def _as_dicts(records: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(record) for name, record in records.items()}


def array_tree(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Return the arrays of an adapter by their generated names."""
    return {
        f"{index:04d}": update.arrays
        if isinstance(update, (LoraPair, TokenRows))
        else {"value": update}
        for index, (_, update) in enumerate(_updates(adapter))
    }


def from_array_tree(adapter: Adapter, arrays: Mapping[str, Mapping[str, Any]]) -> Adapter:
    """Replace the leaves of an adapter: the inverse of `array_tree`."""
    pairs, whole, rows = {}, {}, {}
    names = sorted(arrays, key=int)
    for name, (path, update) in zip(names, _updates(adapter), strict=True):
        if isinstance(update, LoraPair):
            pairs[path] = dataclasses.replace(update, **arrays[name])
        elif isinstance(update, TokenRows):
            rows[path] = dataclasses.replace(update, **arrays[name])
        else:
            whole[path] = arrays[name]["value"]
    return Adapter(pairs, whole, adapter.config, rows)


def _updates(adapter: Adapter) -> list[tuple[str, Any]]:
    """Return paths and updates, in the order of the generated names."""
    groups = (adapter.pairs, adapter.whole, adapter.rows)
    return [item for group in groups for item in sorted(group.items())]


def make_record(array: np.ndarray) -> LeafRecord:
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

    Raises:
      CheckpointError: The file is missing or is not JSON, has another format, a newer version or a
        wrong checksum, or its values do not describe an adapter.
    """
    values = read_json(path, CheckpointError)
    if values.get("format") != FORMAT:
        got = f"format {values.get('format')!r}"
        fix = "Pass the folder of an adapter saved with jl.save_adapter."
        raise CheckpointError(path, got=got, expected=repr(FORMAT), fix=fix)
    if values.get("version") not in _READABLE_VERSIONS:
        got, expected = f"format version {values.get('version')!r}", f"version {VERSION} or earlier"
        fix = "Upgrade jax_lora to the version that saved it."
        raise CheckpointError(path, got=got, expected=expected, fix=fix)
    if not is_sealed(values):
        got, fix = "contents that do not match their checksum", "Copy the folder again."
        raise CheckpointError(path, got=got, expected="an unchanged file", fix=fix)
    expected, fix = "a valid adapter manifest", "Save the adapter again with jl.save_adapter."
    if wrong := list(schema.problems(values, _FIELDS)):
        raise CheckpointError(path, got=wrong[:_MAX_SHOWN_PROBLEMS], expected=expected, fix=fix)
    try:
        return _from_dict(values)
    except (_InvalidManifestError, ConfigError) as cause:
        raise CheckpointError(path, got=cause, expected=expected, fix=fix) from cause


class _InvalidManifestError(ValueError):
    """A value of the manifest contradicts another one, or has no meaning."""


def _from_dict(values: dict[str, Any]) -> Manifest:
    config = LoraConfig.from_dict(_current_config(values["config"], values["version"]))
    pairs = {path: _pair_from_dict(item) for path, item in values["pairs"].items()}
    whole = {path: _leaf_from_dict(item) for path, item in values["whole"].items()}
    rows = {path: _rows_from_dict(item) for path, item in values.get("rows", {}).items()}
    adapter = Adapter(pairs, whole, config, rows)
    size = sum(leaf.nbytes for leaf in named_leaves(adapter).values())
    if size > _MAX_BYTES:
        raise _InvalidManifestError(f"the arrays have {size} bytes, more than {_MAX_BYTES}")
    if not _ARRAYS_NAME.fullmatch(values["arrays"]):
        name = schema.shown(values["arrays"])
        raise _InvalidManifestError(
            f"the arrays folder must be named arrays-<12 hex digits>, got {name}"
        )
    for name in values["files"]:
        _check_relative_path(name)
    base = None
    if values["base"] is not None:
        base = {
            path: LeafFingerprint(tuple(item["shape"]), item["dtype"], item["sample"])
            for path, item in values["base"].items()
        }
    return Manifest(config, adapter, values["arrays"], values["files"], base)


def _current_config(settings: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Convert the settings of an earlier version."""
    settings = dict(settings)
    text = settings.pop("peft_config", "") if version < 3 else ""
    return {**settings, "metadata": {"peft": text}} if text else settings


def _check_relative_path(name: str) -> None:
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise _InvalidManifestError(
            f"file names must be relative paths inside the arrays folder, got {schema.shown(name)}"
        )


def _pair_to_dict(pair: LoraPair) -> dict[str, Any]:
    return {
        **_as_dicts(pair.arrays),
        **{name: list(getattr(pair, name)) for name in _AXES},
        "scale": pair.scale,  # nested tuples become nested lists
        "ranks": pair.ranks,
    }


def _pair_from_dict(item: dict[str, Any]) -> LoraPair:
    a, b = _leaf_from_dict(item["a"]), _leaf_from_dict(item["b"])
    vectors = {name: _leaf_from_dict(item[name]) for name in VECTORS if name in item}
    in_axes, out_axes, stack_axes = axes = tuple(tuple(item[name]) for name in _AXES)
    _check_pair_shapes(axes, a.shape, b.shape, vectors)
    stack_shape, rank = a.shape[: len(stack_axes)], a.shape[-1]
    scale = _parse_per_layer(item["scale"], stack_shape, "scale")
    ranks = item.get("ranks")
    if ranks is not None:
        ranks = _parse_ranks(ranks, stack_shape, rank)
    return LoraPair(a, b, in_axes, out_axes, stack_axes, scale=scale, ranks=ranks, **vectors)


def _check_pair_shapes(
    axes: Sequence[tuple[int, ...]],
    a: tuple[int, ...],
    b: tuple[int, ...],
    vectors: Mapping[str, LeafRecord],
) -> None:
    """Check the axes of a pair, and the shapes of its arrays, against each other."""
    num_in, num_out, num_stack = (len(group) for group in axes)
    in_axes, out_axes, stack_axes = axes
    if sorted((*in_axes, *out_axes, *stack_axes)) != list(range(num_in + num_out + num_stack)):
        raise _InvalidManifestError(
            f"in_axes {in_axes}, out_axes {out_axes} and stack_axes {stack_axes} must name every "
            "axis of the kernel once"
        )
    has_dims = len(a) == num_stack + num_in + 1 and len(b) == num_stack + 1 + num_out
    if not has_dims or a[:num_stack] != b[:num_stack] or a[-1] != b[num_stack]:
        raise _InvalidManifestError(f"a and b have incompatible shapes {a} and {b}")
    expected = (*a[:num_stack], *b[num_stack + 1 :])
    for name, leaf in vectors.items():
        if leaf.shape != expected:
            raise _InvalidManifestError(f"{name} must have shape {expected}, got {leaf.shape}")


def _rows_to_dict(rows: TokenRows) -> dict[str, Any]:
    return {"values": dataclasses.asdict(rows.values), "indices": list(rows.indices)}


def _rows_from_dict(item: dict[str, Any]) -> TokenRows:
    rows = TokenRows(_leaf_from_dict(item["values"]), tuple(item["indices"]))
    # The table size is checked when the base model is available.
    vocab_size = max(rows.indices, default=-1) + 1
    if (reason := rows.problem((vocab_size, *rows.values.shape[1:]))) is not None:
        raise _InvalidManifestError(reason)
    return rows


def _parse_per_layer(value: Any, stack_shape: tuple[int, ...], name: str) -> Any:
    """Parse a number, or nested lists of numbers with the shape of the layer stack."""
    try:
        return _nested_tuples(value, stack_shape if isinstance(value, list) else ())
    except ValueError as cause:
        raise _InvalidManifestError(
            f"{name} must be a number, or nested lists of numbers of shape {stack_shape}, "
            f"got {schema.shown(value)}"
        ) from cause


def _nested_tuples(value: Any, shape: tuple[int, ...]) -> Any:
    if not shape:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError("not a number")
        return value
    if not isinstance(value, list) or len(value) != shape[0]:
        raise ValueError("another shape")
    return tuple(_nested_tuples(each, shape[1:]) for each in value)


def _parse_ranks(value: Any, stack_shape: tuple[int, ...], rank: int) -> tuple[Any, ...]:
    ranks = _parse_per_layer(value, stack_shape, "ranks")
    each = np.asarray(ranks)
    if not isinstance(ranks, tuple) or each.dtype.kind != "i" or not (0 <= each).all():
        raise _InvalidManifestError(
            f"ranks must be non-negative integers, one per layer, got {schema.shown(value)}"
        )
    if each.max() > rank:
        raise _InvalidManifestError(
            f"ranks must be at most {rank}, the rank of a, got {each.max()}"
        )
    return ranks


def _leaf_from_dict(item: dict[str, Any]) -> LeafRecord:
    name = item["dtype"]
    try:
        dtype = jnp.dtype(name) if name.isidentifier() else None
    except TypeError:  # not the name of a dtype
        dtype = None
    if dtype is None or (not jnp.issubdtype(dtype, np.number) and dtype != np.bool_):
        raise _InvalidManifestError(
            f"dtype must be the name of a numeric dtype or bool, got {schema.shown(name)}"
        )
    return LeafRecord(tuple(item["shape"]), dtype.name, item["checksum"])


def leaf_problems(adapter: Adapter, arrays: Adapter) -> list[str]:
    """List the leaves with another shape, dtype or checksum than recorded, or with NaN or Inf.

    The arrays may be `jax.ShapeDtypeStruct`s, which have no values to check.
    """
    problems = []
    actual_leaves = named_leaves(arrays)
    for name, expected in named_leaves(adapter).items():
        actual = actual_leaves[name]
        has_values = isinstance(actual, np.ndarray)  # a ShapeDtypeStruct has none to check
        if tuple(actual.shape) != expected.shape or str(actual.dtype) != expected.dtype:
            problems.append(
                f"{name} has shape {tuple(actual.shape)} and dtype {actual.dtype}, "
                f"expected {expected.shape} and {expected.dtype}"
            )
        elif has_values and make_record(actual).checksum != expected.checksum:
            problems.append(f"{name} does not match its checksum")
        elif has_values and (bad := count_non_finite(actual)):
            problems.append(f"{name} has {bad} elements that are NaN or Inf")
    return problems


def count_non_finite(array: Any) -> int:
    """Count NaN and Inf in an array of any dtype."""
    if not jnp.issubdtype(array.dtype, np.inexact):
        return 0
    return int(np.sum(~np.isfinite(np.asarray(array))))
