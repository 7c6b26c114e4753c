"""save_adapter and load_adapter: an adapter on disk, tied to the base that it was trained on.

    path/adapter.json            configuration, shapes, checksums, fingerprint of the base
    path/arrays-0123456789ab/    an Orbax checkpoint of the adapter's leaves, and of nothing else

`adapter.json` names its folder of arrays and is put in place last, in one step. So at every moment
`path` holds the old adapter or the new one, whenever a process dies.
"""

from __future__ import annotations

import json
import os
import shutil
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
from jax_lora.checkpoint.fingerprint import LeafPrint, differences, fingerprint
from jax_lora.checkpoint.manifest import Manifest
from jax_lora.errors import BaseMismatchError, CheckpointError, CheckpointWarning, format_error
from jax_lora.storage import array_store, multihost

_MANIFEST = "adapter.json"
_SHOWN_VALUES = 10  # another base of the same shape differs in every leaf; this many are named

# -----------------------------------------------------------------------------------------------
# Saving
# -----------------------------------------------------------------------------------------------


def save_adapter(
    path: str | os.PathLike[str], adapter: Adapter, base: Any = None, *, overwrite: bool = False
) -> None:
    """Save an adapter: its leaves with Orbax, and what is needed to put them back.

    The folder holds the trained numbers only, so it is megabytes where the base is gigabytes. It
    appears in one step: a process that dies while saving leaves what was there before.

    Args:
      path: Folder to save to, on a local file system; made if it is not there. Other files in
        it are left alone. With several processes, one that all of them see: all call this, the
        first one writes, and none goes on before it is done.
      adapter: The adapter, on any devices.
      base: The base model that it was trained on (arrays, on any devices). Its fingerprint lets
        `load_adapter` refuse every other base. Without it, only shapes can be checked.
      overwrite: Whether an adapter that is there already may be replaced.

    Raises:
      CheckpointError: An adapter is there already, a leaf is not finite or has no values, or the
        file system refuses. What was there before is untouched.

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
    folder = Path(path).absolute()
    arrays = _to_host(folder, adapter)
    base_print = None if base is None else fingerprint(base)
    if not multihost.first_alone(lambda: _write(folder, arrays, base_print, overwrite)):
        raise CheckpointError(
            format_error(
                f"save_adapter: {folder}",
                got=f"process 0 could not save, so process {jax.process_index()} goes no further",
                expected="an adapter on disk in every process or in none",
                fix="See what process 0 says.",
            )
        )


def _write(
    folder: Path, arrays: Adapter, base: Mapping[str, LeafPrint] | None, overwrite: bool
) -> None:
    _check_free(folder, overwrite)
    name = f"arrays-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        array_store.write_arrays(folder / name, manifest.array_tree(arrays))
        _write_manifest(folder, _describe(folder, name, arrays, base))
    except Exception as cause:
        shutil.rmtree(folder / name, ignore_errors=True)
        raise CheckpointError(
            format_error(
                f"save_adapter: {folder}",
                got=f"{type(cause).__name__}: {cause}",
                expected="a folder that can be written to, on a file system with room",
                fix="Free some space or save elsewhere. What was saved there before is untouched.",
            )
        ) from cause
    _remove_stale(folder, keep=name)


def _check_free(folder: Path, overwrite: bool) -> None:
    if (folder / _MANIFEST).exists() and not overwrite:
        got, fix = "an adapter that was saved there before", "pass overwrite=True to replace it"
    elif folder.exists() and not folder.is_dir():
        got, fix = "a file of that name", "move the file away"
    else:
        return
    raise CheckpointError(
        format_error(
            f"save_adapter: {folder}",
            got=got,
            expected="a folder without an adapter, or none yet",
            fix=f"Save to another folder, or {fix}.",
        )
    )


def _to_host(folder: Path, adapter: Adapter) -> Adapter:
    """Copy the leaves to NumPy, so that nothing of the mesh they lay on is saved."""
    arrays = jax.tree.map(
        lambda leaf: multihost.to_host(leaf) if _has_values(leaf) else leaf, adapter
    )
    leaves = manifest.named_leaves(arrays)
    problems = [f"{name} {why}" for name, leaf in leaves.items() if (why := _why_not(leaf))]
    if not problems:
        return arrays
    raise CheckpointError(
        format_error(
            f"save_adapter: {folder}",
            got=_listed(problems),
            expected="finite arrays that this process can read",
            fix="Save an adapter from before the loss broke, outside jit. Nothing was written.",
        )
    )


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, Tracer)


def _why_not(leaf: Any) -> str | None:
    if not isinstance(leaf, np.ndarray):
        return f"is a {type(leaf).__name__} without values"
    bad = manifest.count_not_finite(leaf)
    return f"has {bad} entries that are NaN or Inf" if bad else None


def _describe(
    folder: Path, name: str, arrays: Adapter, base: Mapping[str, LeafPrint] | None
) -> Manifest:
    records = jax.tree.map(manifest.record, arrays)
    return Manifest(arrays.config, records, name, array_store.checksums(folder / name), base)


def _write_manifest(folder: Path, what: Manifest) -> None:
    part = folder / f"{what.arrays}.json.part"
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(what.to_dict(), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())  # the numbers are on disk before the name is
        os.replace(part, folder / _MANIFEST)
    finally:
        part.unlink(missing_ok=True)


def _remove_stale(folder: Path, keep: str) -> None:
    """Remove the arrays of replaced adapters and of saves that died."""
    for entry in folder.glob("arrays-*"):
        if entry.name != keep and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()


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
    """Load an adapter that `save_adapter` saved, after checking every byte of it.

    Nothing is returned unless all is as it was saved: a missing, extra, reshaped or damaged leaf
    and a base other than the adapter's own are refused, all problems in one message. No code from
    the folder is run, and no file outside it is opened.

    Args:
      path: The folder.
      base: The base model at hand. With values, it must be the one that the adapter was trained
        on; of `jax.ShapeDtypeStruct`s only paths, shapes and types are compared. None loads the
        adapter with no base in memory, and checks nothing about it.
      target: An adapter of arrays or `jax.ShapeDtypeStruct`s that says what is expected and
        where each leaf goes (its sharding). None puts all on the default device. The devices
        that the adapter was saved from do not matter.
      force: Load for another base in spite of its fingerprint, with a warning. Adapted leaves
        must be there in the right shapes all the same.

    Returns:
      The adapter, with its configuration.

    Raises:
      BaseMismatchError: The base is not the one that the adapter was trained on.
      CheckpointError: Anything else is not as it should be.

    Warns:
      CheckpointWarning: `force` had to be used, or no fingerprint was saved to compare `base` with.
    """
    folder = Path(path).absolute()
    what = _read_manifest(folder)
    damage = [
        *array_store.file_problems(folder / what.arrays, what.files),
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
    raise CheckpointError(
        format_error(
            f"load_adapter: {folder}",
            got=got,
            expected=f"a folder that save_adapter wrote, with {_MANIFEST}",
            fix="Check the path; a save that was interrupted leaves no adapter behind.",
        )
    )


def _read_arrays(folder: Path, what: Manifest) -> tuple[Any, list[str]]:
    """Read the arrays as NumPy, and say what is wrong with them."""
    template = manifest.array_tree(manifest.abstract(what.adapter))
    try:
        arrays = array_store.read_arrays(folder / what.arrays, template)
    except Exception as cause:  # whatever Orbax meets in files that a stranger wrote
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
            problems.append(f"{name} was not saved, but is in the target")
        elif (tuple(leaf.shape), str(leaf.dtype)) != (saved[name].shape, saved[name].dtype):
            problems.append(
                f"{name} was saved with shape {saved[name].shape} and type {saved[name].dtype}, "
                f"the target has {tuple(leaf.shape)} and {leaf.dtype}"
            )
    return problems


def _base_problems(folder: Path, what: Manifest, base: Any, force: bool) -> list[str]:
    unfit = _unfit(what.adapter, base)
    if what.base is None:
        _warn(folder, "no fingerprint of the base was saved, so only shapes were compared")
        return list(unfit.values())
    other = {path: why for path, why in differences(what.base, base).items() if path not in unfit}
    if force and other:
        _warn(folder, f"force=True: the base is another one{_listed(_grouped(other))}")
        return list(unfit.values())
    return [*unfit.values(), *_grouped(other)]


def _unfit(adapter: Adapter, base: Any) -> dict[str, str]:
    """Say where the base has no place for an adapter's leaf."""
    leaves = dict(paths.flatten_with_paths(base, is_leaf=is_weight)[0])
    problems = {}
    for path, update in adapter.updates.items():
        if path not in leaves:
            near = ", ".join(paths.nearest(path, leaves, 3))
            problems[path] = f"{path}: not in this base; the nearest are {near}"
        elif (why := misfit(update, base_of(leaves[path]), "base")) is not None:
            problems[path] = f"{path}: {why}"
    return problems


def _grouped(differences: Mapping[str, str]) -> list[str]:
    lines = [f"{path}: {why}" for path, why in differences.items()]
    values = [line for line in lines if line.endswith("has other values")]
    rest = [line for line in lines if line not in values]
    if len(values) > _SHOWN_VALUES:
        more = f"and {len(values) - _SHOWN_VALUES} more leaves have other values"
        values = [*values[:_SHOWN_VALUES], more]
    return rest + values


def _refusal(folder: Path, damage: list[str], mismatch: list[str]) -> CheckpointError:
    kind = CheckpointError if damage else BaseMismatchError
    fixes = []
    if damage:
        fixes.append("Copy the folder again, or go back to an earlier checkpoint.")
    if mismatch:
        fixes.append("Load the base that it was trained on; force=True overrides a fingerprint.")
    return kind(
        format_error(
            f"load_adapter: {folder}",
            got=_listed([*damage, *mismatch]),
            expected="the adapter as it was saved, and the base that it was trained on",
            fix=" ".join(fixes),
        )
    )


def _listed(problems: list[str]) -> str:
    return "".join(f"\n    {problem}" for problem in problems)


def _warn(folder: Path, what: str) -> None:
    warnings.warn(f"load_adapter: {folder}: {what}", CheckpointWarning, stacklevel=4)


def _place(adapter: Adapter, target: Adapter | None) -> Adapter:
    if target is None:
        return jax.tree.map(jnp.array, adapter)  # not tied to a device: goes with any base
    wanted = manifest.from_array_tree(adapter, manifest.array_tree(target))
    return jax.tree.map(
        lambda array, like: jax.device_put(jnp.array(array), getattr(like, "sharding", None)),
        adapter,
        wanted,
    )
