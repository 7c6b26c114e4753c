"""adapter_shardings: factors are sharded as the weights that they update."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_lora import paths
from jax_lora.adapter import Adapter, base_of, is_weight
from jax_lora.algebra.base_weight import Recipe
from jax_lora.errors import StructureError
from jax_lora.quantize import QuantizedWeight
from jax_lora.updates import LoraPair, TokenRows


def adapter_shardings(variables: Any, adapter: Adapter) -> Adapter:
    """Choose the shardings of an adapter from those of its base model.

    The factor `a` is sharded like the input axes of the kernel, `b` like its output axes, and both
    like its stack axes; ranks are not sharded. A fully trained leaf is sharded like its leaf. Use
    it for `jax.device_put`, or for the `out_shardings` of `jax.jit`, so that the adapter never is
    on one device as a whole, and the second training step is not compiled again.

    Args:
      variables: The base model's variables: arrays, `jax.ShapeDtypeStruct`s with shardings, or a
        tree of shardings.
      adapter: The adapter, or its shapes from `jax.eval_shape`.

    Returns:
      An `Adapter` of shardings, with the structure of `adapter`.

    Raises:
      StructureError: A path of the adapter is not in `variables`, or its leaf has no sharding.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> params = jax.device_put(params, NamedSharding(mesh, P("fsdp", None)))
      >>> shardings = jl.adapter_shardings(params, adapter)
      >>> tuple(shardings.pairs["kernel"].a.spec), tuple(shardings.pairs["kernel"].b.spec)
      (('fsdp', None), (None, None))
      >>> adapter = jax.device_put(adapter, shardings)
    """
    leaves = dict(paths.flatten_with_paths(variables, is_leaf=is_weight)[0])
    updates = {}
    for path, update in adapter.updates.items():
        if path not in leaves:
            near = ", ".join(paths.nearest(path, leaves, 3))
            raise _unplaced(path, f"no such leaf; the closest paths are {near}")
        updates[path] = _of_update(update, _sharding(path, base_of(leaves[path])))
    return Adapter.of(updates, adapter.config)


def _of_update(update: Any, sharding: Sharding) -> Any:
    if isinstance(update, LoraPair):
        stack, outputs = update.stack_axes, update.out_axes
        axes: dict[str, tuple[int | None, ...]] = {
            "a": (*stack, *update.in_axes, None),
            "b": (*stack, None, *outputs),
        }
        axes = {name: axes.get(name, (*stack, *outputs)) for name in update.arrays}
    elif isinstance(update, TokenRows):
        axes = {"values": (None, 1)}
    else:
        return dataclasses.replace(update, value=sharding)
    return dataclasses.replace(
        update, **{name: _along(sharding, of_array) for name, of_array in axes.items()}
    )


def _along(sharding: Sharding, axes: Sequence[int | None]) -> Sharding:
    """Return the sharding of an array whose axes are these axes of the leaf; None is a new axis."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    by_axis = dict(enumerate(sharding.spec))
    spec = PartitionSpec(*(None if axis is None else by_axis.get(axis) for axis in axes))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _sharding(path: str, leaf: Any) -> Sharding:
    if isinstance(leaf, Recipe):
        return _of_recipe(path, leaf)
    found = leaf if isinstance(leaf, Sharding) else getattr(leaf, "sharding", None)
    if isinstance(found, Sharding):
        return found
    raise _unplaced(path, f"a {type(leaf).__name__} without a sharding")


def _of_recipe(path: str, recipe: Recipe) -> Sharding:
    """Return the sharding of a quantized weight; other recipes are on every device as a whole."""
    quantized = isinstance(recipe, QuantizedWeight)
    array = recipe.arrays["codes"] if quantized else jax.tree.leaves(recipe.arrays)[0]
    found, spec = _sharding(path, array), ()
    if not isinstance(found, NamedSharding):
        return found
    if quantized:
        codes = (*found.spec, *(None,) * (len(array.shape) - len(found.spec)))
        spec = recipe.make.weight_spec(codes)  # type: ignore[attr-defined]
    return NamedSharding(found.mesh, PartitionSpec(*spec))


def _unplaced(path: str, got: str) -> StructureError:
    return StructureError(
        f"adapter_shardings: {path}",
        got=got,
        expected="the variables of the base model, on their devices",
        fix="Pass what jax.device_put returned, shapes with shardings, or the shardings.",
    )
