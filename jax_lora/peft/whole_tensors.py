"""Tensors of PEFT files that are not factors.

<module>.weight, <module>.bias                 modules_to_save, biases, a resized vocabulary
<module>.base_layer.bias                       the bias of an adapted module
<module>.base_layer.weight                     a copy of the table or head of the base model
<module>.token_adapter.base_layer.weight       the same, with trained rows
<module>.token_adapter.trainable_tokens_delta  trained rows of a table
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import paths
from jax_lora.peft import keys
from jax_lora.peft.hf_modules import Leaf, Site
from jax_lora.peft.target_modules import matches
from jax_lora.updates import TokenRows


def read(
    rest: Mapping[str, np.ndarray],
    base: Mapping[str, Any],
    sites: Mapping[str, Site],
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, TokenRows], list[str]]:
    """Convert the tensors that are not factors.

    Returns:
      Fully trained leaves by path, trained rows by path, and a list of problems.
    """
    whole: dict[str, Any] = {}
    rows: dict[str, TokenRows] = {}
    problems: list[str] = []
    for name, tensor in rest.items():
        bare = name.removeprefix(keys.PREFIX)
        if keys.is_copy(bare):
            continue
        module, what = _taken_apart(bare)
        site = sites.get(module)
        if site is None or not name.startswith(keys.PREFIX):
            near = ", ".join(paths.nearest(module, sites, 3))
            problems.append(f"extra: {bare} {tensor.shape}; the closest modules are {near}")
        elif what == keys.ROWS:
            problems += _read_rows(rows, tensor, site, config)
        elif what in (keys.ROWS_FROZEN, keys.FROZEN):
            problems += _compare_copy(bare, tensor, site, base)
        else:
            path = site.leaf.path if what == ".weight" else bias_path(site.leaf.path)
            problems += _read_whole(whole, bare, tensor, path, site, base)
    return whole, rows, problems


def bias_path(path: str) -> str:
    """Return the path of the bias in the layer of a kernel or a scale."""
    return "/".join([*path.split("/")[:-1], "bias"])


def _taken_apart(name: str) -> tuple[str, str]:
    for what in (keys.ROWS, keys.ROWS_FROZEN, keys.FROZEN, ".base_layer.bias", ".weight", ".bias"):
        if name.endswith(what):
            return name.removesuffix(what), what
    return name, ""


def _read_rows(
    rows: dict[str, TokenRows], tensor: np.ndarray, site: Site, config: Mapping[str, Any]
) -> Iterator[str]:
    indices = config["trainable_token_indices"]
    if isinstance(indices, dict):
        named = [v for k, v in indices.items() if matches(k, site.module)]
        indices = named[0] if named else None
    size, width = site.leaf.kernel.in_size, site.leaf.kernel.out_size
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < size for i in indices):
        yield f"trainable_token_indices = {indices!r}: expected a list of tokens below {size}"
    elif not site.leaf.is_table or tensor.shape != (len(indices), width):
        want = (len(indices), width)
        yield f"wrong shape: {site.module}{keys.ROWS} is {tensor.shape}, expected {want}"
    else:
        rows[site.leaf.path] = TokenRows(jnp.asarray(tensor, jnp.float32), tuple(indices))


def _compare_copy(
    name: str, tensor: np.ndarray, site: Site, base: Mapping[str, Any]
) -> Iterator[str]:
    """Check that a copy of a base weight is equal to it: otherwise the base models differ."""
    leaf = base[site.leaf.path]
    want = leaf.shape if site.leaf.is_table else leaf.shape[::-1]
    if tensor.shape != want:
        suffix = _resize(tensor, want)
        yield f"{name}: the base model has shape {want}, the file has {tensor.shape}{suffix}"
    elif not isinstance(leaf, jax.ShapeDtypeStruct):
        have = np.asarray(leaf if site.leaf.is_table else leaf.T)
        if not np.array_equal(have, tensor.astype(have.dtype)):
            yield f"{name}: differs from the base: the adapter is for a different base model"


def _resize(tensor: np.ndarray, want: tuple[int, ...]) -> str:
    if tensor.ndim != 2 or tensor.shape[1] != want[1]:
        return ""
    size = tensor.shape[0]
    return f"; jl.peft.load_model(path, model, params) resizes the vocabulary to {size} tokens"


def _read_whole(
    whole: dict[str, Any],
    name: str,
    tensor: np.ndarray,
    path: str,
    site: Site,
    base: Mapping[str, Any],
) -> Iterator[str]:
    if path not in base:
        yield f"extra: {name} {tensor.shape}; the base model has no {path}"
        return
    leaf, depth = base[path], len(site.position)
    want = tuple(leaf.shape[depth:])
    if site.leaf.columns is not None:
        start, stop = site.leaf.columns
        want = (*want[:-1], stop - start)
    oriented = _oriented(tensor, want, site.leaf, path)
    if oriented is None:
        have = want if site.leaf.is_table or len(want) < 2 else want[::-1]
        yield f"wrong shape: {name} is {tensor.shape}, expected {have}{_resize(tensor, have)}"
        return
    if not depth:
        whole[path] = oriented
        return
    if path not in whole:  # layers that are not in the file keep the base weights
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        dtype = oriented.dtype
        whole[path] = np.zeros(leaf.shape, dtype) if is_shape else np.array(leaf, dtype)
    whole[path][site.index] = oriented


def _oriented(
    tensor: np.ndarray, want: tuple[int, ...], leaf: Leaf, path: str
) -> np.ndarray | None:
    """Transpose (out, in) of PyTorch to (in, out); tables and vectors are not transposed."""
    if tensor.ndim == 2 and not leaf.is_table and path == leaf.path and tensor.shape[::-1] == want:
        return tensor.T
    return tensor if tensor.shape == want else None


# -----------------------------------------------------------------------------------------------
# Writing
# -----------------------------------------------------------------------------------------------


def write(array: Any, leaf: Leaf, path: str, adapted: set[str]) -> dict[str, np.ndarray]:
    """Convert a fully trained leaf to PEFT tensors by name.

    For a bias, `leaf` is the kernel or scale in the same layer, and `path` is its own. In modules
    with factors, `adapted`, PEFT nests the bias in `.base_layer`.
    """
    array = np.asarray(array)
    is_bias = path != leaf.path
    tensors = {}
    for module, position in leaf.modules():
        part = array[position]
        inner = ".base_layer" if is_bias and module in adapted else ""
        name = f"{keys.PREFIX}{module}{inner}.{'bias' if is_bias else 'weight'}"
        matrix = part.ndim == 2 and not leaf.is_table
        tensors[name] = part.T if matrix and not is_bias else part
    return tensors
