"""save_adapter and load_adapter: store only the adapter, and verify the base model on load.

    path/adapter.json            configuration, shapes, checksums, fingerprint of the base model
    path/arrays-0123456789ab/    an Orbax checkpoint of the adapter weights

`adapter.json` refers to its folder of arrays and is replaced last, atomically. If a process is
killed while saving, `path` still has either the old adapter or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_lora import paths
from jax_lora.adapter import Adapter, base_of, is_weight, misfit
from jax_lora.checkpoint import manifest
from jax_lora.checkpoint.fingerprint import LeafFingerprint, differences, fingerprint
from jax_lora.checkpoint.manifest import Manifest
from jax_lora.errors import BaseMismatchError, CheckpointError, CheckpointWarning
from jax_lora.storage import array_store, multihost
from jax_lora.storage.atomic_writes import (
    convert_os_errors,
    made_folder,
    remove,
    remove_parts,
    write_file,
)
from jax_lora.storage.limits import expanded_limit, limit_hint
from jax_lora.storage.locks import locked
from jax_lora.storage.safe_paths import given_path

_MANIFEST = "adapter.json"
_SHOWN_VALUES = 10  # a different base model differs in every leaf; a message lists this many

# -----------------------------------------------------------------------------------------------
# Saving
# -----------------------------------------------------------------------------------------------


def save_adapter(
    path: str | os.PathLike[str], adapter: Adapter, base: Any = None, *, overwrite: bool = False
) -> None:
    """Save an adapter and the fingerprint of its base model.

    The checkpoint has only the adapter weights: megabytes for a base model of gigabytes. Saving is
    atomic: if it fails or the process is killed, an earlier adapter in the folder is unchanged.

    Args:
      path: Folder on a local file system, created if necessary. Other files in it are not changed.
        With several processes, all of them must call this with a folder on a shared file system;
        process 0 writes, and the others wait.
      adapter: The adapter, on any devices.
      base: The base model that the adapter was trained on, as arrays on any devices. With its
        fingerprint, `load_adapter` refuses other base models. Without it, only shapes are checked.
      overwrite: Whether to replace an adapter in the folder.

    Raises:
      CheckpointError: The folder already has an adapter, a leaf has NaN or Inf or is not a concrete
        array, or the folder cannot be written.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapter(folder, adapter, base=params)
      ...     again = load_adapter(folder, base=params)
      >>> bool((again.pairs["kernel"].a == adapter.pairs["kernel"].a).all())
      True
    """
    folder = given_path(path, CheckpointError).absolute()
    arrays = _to_host(folder, adapter)
    base_print = None if base is None else fingerprint(base)
    multihost.first_alone(lambda: _write(folder, arrays, base_print, overwrite))


def _write(
    folder: Path, arrays: Adapter, base: Mapping[str, LeafFingerprint] | None, overwrite: bool
) -> None:
    with convert_os_errors(folder, CheckpointError):
        _check_free(folder, overwrite)
    name = f"arrays-{uuid.uuid4().hex[:12]}"
    with made_folder(folder, CheckpointError), locked(folder, CheckpointError):
        _check_free(folder, overwrite)  # again, as it may have been saved before it was locked
        _remove_unfinished(folder)
        try:
            with convert_os_errors(folder, CheckpointError):
                array_store.write_arrays(folder / name, manifest.array_tree(arrays))
                records = jax.tree.map(manifest.make_record, arrays)
                files = array_store.checksums(folder / name)
                what = Manifest(arrays.config, records, name, files, base)
                text = json.dumps(what.to_dict(), indent=1, allow_nan=False)
                write_file(folder / _MANIFEST, text, CheckpointError)
        except BaseException:
            remove(folder / name)
            raise
        _remove_arrays(folder, keep=name)


def _check_free(folder: Path, overwrite: bool) -> None:
    if (folder / _MANIFEST).exists() and not overwrite:
        got, fix = "a folder with an adapter", "pass overwrite=True to replace it"
    elif folder.exists() and not folder.is_dir():
        got, fix = "a file of that name", "move the file"
    else:
        return
    expected = "a folder without an adapter, or a new folder"
    fix = f"Save to another folder, or {fix}."
    raise CheckpointError(f"save_adapter: {folder}", got=got, expected=expected, fix=fix)


def _to_host(folder: Path, adapter: Adapter) -> Adapter:
    """Copy the leaves to NumPy, so that Orbax saves no shardings."""
    arrays = jax.tree.map(
        lambda leaf: multihost.to_host(leaf) if _has_values(leaf) else leaf, adapter
    )
    leaves = manifest.named_leaves(arrays)
    problems = [f"{name} {why}" for name, leaf in leaves.items() if (why := _why_not(leaf))]
    if not problems:
        return arrays
    fix = "Save an adapter from before the NaN loss, outside jit. Nothing was written."
    raise CheckpointError(
        f"save_adapter: {folder}", got=problems, expected="finite, concrete arrays", fix=fix
    )


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, Tracer)


def _why_not(leaf: Any) -> str | None:
    if not isinstance(leaf, np.ndarray):
        return f"is a {type(leaf).__name__} without values"
    bad = manifest.count_non_finite(leaf)
    return f"has {bad} elements that are NaN or Inf" if bad else None


def _remove_unfinished(folder: Path) -> None:
    """Remove what interrupted saves left, so that there is room for the next one."""
    remove_parts(folder, _MANIFEST)
    file = folder / _MANIFEST
    if not os.path.lexists(file):
        _remove_arrays(folder)
    elif sum(1 for _ in folder.glob("arrays-*")) > 1:
        with contextlib.suppress(CheckpointError):  # whose arrays they are cannot be told then
            _remove_arrays(folder, keep=manifest.read_manifest(file).arrays)


def _remove_arrays(folder: Path, keep: str | None = None) -> None:
    for entry in folder.glob("arrays-*"):
        if entry.name != keep and not entry.is_symlink():
            remove(entry)


# -----------------------------------------------------------------------------------------------
# Loading
# -----------------------------------------------------------------------------------------------


def load_adapter(
    path: str | os.PathLike[str],
    base: Any = None,
    *,
    target: Adapter | None = None,
    force: bool = False,
) -> Adapter:
    """Load an adapter from `save_adapter`, and verify its checksums and its base model.

    A missing, additional, reshaped or damaged leaf or a different base model is an error; one
    message lists all problems. No code from the folder is executed, and no file outside the folder
    is opened.

    Args:
      path: The folder.
      base: The base model. Arrays must be those that the adapter was trained on; for
        `jax.ShapeDtypeStruct`s, only paths, shapes and dtypes are compared. None skips the check.
      target: An adapter of arrays or `jax.ShapeDtypeStruct`s with the expected shapes, types and
        shardings. None loads to the default device. The adapter may have been saved from any
        devices.
      force: Load the adapter for a base model with another fingerprint, with a warning. The shapes
        of the adapted leaves must still match.

    Returns:
      The adapter, with its configuration.

    Raises:
      BaseMismatchError: The adapter was trained on a different base model.
      CheckpointError: The adapter is missing, damaged, or does not match `target`.

    Warns:
      CheckpointWarning: `force` was necessary, or the checkpoint has no fingerprint.
    """
    folder = given_path(path, CheckpointError).absolute()
    what = _read_manifest(folder)
    declared = sum(leaf.nbytes for leaf in manifest.named_leaves(what.adapter).values())
    damage = [
        *array_store.file_problems(folder / what.arrays, what.files, declared),
        *_size_problems(folder / what.arrays, declared),
        *_target_problems(what, target),
    ]
    arrays, more = (None, []) if damage else _read_arrays(folder, what)
    damage += more
    mismatch = [] if base is None else _base_problems(folder, what, base, force)
    if damage or mismatch:
        raise _refusal(folder, damage, mismatch)
    return _place(manifest.from_array_tree(what.adapter, arrays or {}), target)


def _read_manifest(folder: Path) -> Manifest:
    if (folder / _MANIFEST).is_file() and not (folder / _MANIFEST).is_symlink():
        return manifest.read_manifest(folder / _MANIFEST)
    if not folder.is_dir():
        got = "no such folder"
    else:
        inside = sorted(each.name for each in folder.iterdir())[:8]
        got = f"a folder without {_MANIFEST}, holding {', '.join(inside) or 'nothing'}"
    expected = f"a folder that save_adapter wrote, with {_MANIFEST}"
    fix = "Check the path. An interrupted save leaves no adapter."
    raise CheckpointError(f"load_adapter: {folder}", got=got, expected=expected, fix=fix)


def _size_problems(folder: Path, declared: int) -> list[str]:
    """Refuse arrays that are far larger than their files, as compressed zeros can be."""
    stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if declared <= expanded_limit(stored):
        return []
    hint = limit_hint("expanded_bytes")
    return [f"{folder.name}: arrays of {declared:,} bytes in {stored:,} bytes of files. {hint}"]


def _read_arrays(folder: Path, what: Manifest) -> tuple[Any, list[str]]:
    """Read the arrays as NumPy; return them with a list of problems."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), what.adapter)
    try:
        arrays = array_store.read_arrays(folder / what.arrays, manifest.array_tree(shapes))
    except Exception as cause:  # Orbax raises many types for untrusted files
        return None, [f"{what.arrays}: {type(cause).__name__}: {cause}"]
    have = manifest.from_array_tree(what.adapter, arrays)
    return arrays, manifest.leaf_problems(what.adapter, have)


def _target_problems(what: Manifest, target: Adapter | None) -> list[str]:
    if target is None:
        return []
    saved, wanted = manifest.named_leaves(what.adapter), manifest.named_leaves(target)
    problems = [f"{name} is not in the target" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        if name not in saved:
            problems.append(f"{name} is in the target, but was not saved")
        elif (tuple(leaf.shape), str(leaf.dtype)) != (saved[name].shape, saved[name].dtype):
            problems.append(
                f"{name} was saved with shape {saved[name].shape} and dtype {saved[name].dtype}, "
                f"the target has {tuple(leaf.shape)} and {leaf.dtype}"
            )
    return problems


def _base_problems(folder: Path, what: Manifest, base: Any, force: bool) -> list[str]:
    unfit = _unfit(what.adapter, base)
    if what.base is None:
        _warn(folder, "saved without a fingerprint of the base model, so only shapes are compared")
        return list(unfit.values())
    other = {path: why for path, why in differences(what.base, base).items() if path not in unfit}
    if force and other:
        lines = "".join(f"\n    {problem}" for problem in _grouped(other))
        _warn(folder, f"force=True: loaded for a different base model{lines}")
        return list(unfit.values())
    return [*unfit.values(), *_grouped(other)]


def _unfit(adapter: Adapter, base: Any) -> dict[str, str]:
    """Return the leaves of the adapter that do not fit the base model, with reasons."""
    leaves = dict(paths.flatten_with_paths(base, is_leaf=is_weight)[0])
    problems = {}
    for path, update in adapter.updates.items():
        if path not in leaves:
            near = ", ".join(paths.nearest(path, leaves, 3))
            problems[path] = f"{path}: not in this base model; the closest paths are {near}"
        elif (why := misfit(update, base_of(leaves[path]), "base")) is not None:
            problems[path] = f"{path}: {why}"
    return problems


def _grouped(differences: Mapping[str, str]) -> list[str]:
    lines = [f"{path}: {why}" for path, why in differences.items()]
    values = [line for line in lines if line.endswith("has different values")]
    rest = [line for line in lines if line not in values]
    if len(values) > _SHOWN_VALUES:
        more = f"and {len(values) - _SHOWN_VALUES} more leaves have different values"
        values = [*values[:_SHOWN_VALUES], more]
    return rest + values


def _refusal(folder: Path, damage: list[str], mismatch: list[str]) -> CheckpointError:
    kind = CheckpointError if damage else BaseMismatchError
    fixes = []
    if damage:
        fixes.append("Copy the folder again, or use an earlier checkpoint.")
    if mismatch:
        fixes.append("Load the base model it was trained on; force=True ignores the fingerprint.")
    expected = "an undamaged adapter, and the base model it was trained on"
    where, got = f"load_adapter: {folder}", [*damage, *mismatch]
    return kind(where, got=got, expected=expected, fix=" ".join(fixes))


def _warn(folder: Path, what: str) -> None:
    warnings.warn(f"load_adapter: {folder}: {what}", CheckpointWarning, stacklevel=4)


def _place(adapter: Adapter, target: Adapter | None) -> Adapter:
    if target is None:
        return jax.tree.map(jnp.array, adapter)  # uncommitted, to combine with any base model
    wanted = manifest.from_array_tree(adapter, manifest.array_tree(target))
    return jax.tree.map(
        lambda array, like: jax.device_put(jnp.array(array), getattr(like, "sharding", None)),
        adapter,
        wanted,
    )
