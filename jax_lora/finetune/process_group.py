"""The processes of a run: which rows are mine, who writes, and whether all agree.

`process_group()` returns an object with the answers of one process, or of several processes that
`jax.distributed` has joined. The rest of the package asks it, and does not count processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_lora.errors import ConfigError
from jax_lora.finetune.devices import split_rows
from jax_lora.models.mesh_sharding import row_spec
from jax_lora.storage import multihost


class ProcessGroup:
    """One process: all rows are its own, it writes every file, and it agrees with itself."""

    alone = True
    writes = True

    def check_mesh(self, mesh: Mesh | None) -> None:
        """Refuse a mesh without devices of every process."""

    def own_rows(self, mesh: Mesh | None, rows: int) -> np.ndarray | None:
        """Return the indices of the rows of a batch that this process reads; None: all of them."""
        return None

    def assemble(self, batch: Any, mesh: Mesh) -> Any:
        """Form global arrays from the rows of each process."""
        return split_rows(batch, mesh)

    def put(self, tree: Any, shardings: Any) -> Any:
        """Shard arrays that every process has as a whole; arrays in their place stay there."""
        return jax.device_put(tree, shardings)

    def gathered(self, tree: Any) -> Any:
        """Return arrays that the writer can read as a whole; all processes must call it."""
        return tree

    def own_copy(self, tree: Any) -> Any:
        """Return the arrays on devices of this process; None if they are sharded over several."""
        return tree

    def first(self, do: Callable[[], Any]) -> Any:
        """Run a function in the writer only; its plain result or its error is that of all."""
        return do()

    def require_same(self, values: Mapping[str, str]) -> None:
        """Refuse values that differ between processes."""

    def start_max(self, number: int) -> Any:
        """Start to compute the largest of the numbers of all processes, for `int`."""
        return number


class _Joined(ProcessGroup):
    """Several processes, which call each method in the same order."""

    alone = False

    def __init__(self) -> None:
        self.writes = jax.process_index() == 0

    def check_mesh(self, mesh: Mesh | None) -> None:
        count = jax.process_count()
        found = set() if mesh is None else {device.process_index for device in mesh.devices.flat}
        if len(found) == count:
            return
        raise ConfigError(
            "mesh",
            got="None" if mesh is None else f"devices of the processes {sorted(found)}",
            expected=f"a mesh with devices of all {count} processes",
            fix='Pass, for example, jax.make_mesh((jax.device_count(),), ("data",)).',
        )

    def own_rows(self, mesh: Mesh | None, rows: int) -> np.ndarray | None:
        return None if mesh is None else _rows_here(NamedSharding(mesh, row_spec(mesh)), rows)

    def assemble(self, batch: Any, mesh: Mesh) -> Any:
        form = functools.partial(
            jax.make_array_from_process_local_data, NamedSharding(mesh, row_spec(mesh))
        )
        return jax.tree.map(form, batch)

    def put(self, tree: Any, shardings: Any) -> Any:
        return jax.tree.map(_put, tree, shardings)

    def gathered(self, tree: Any) -> Any:
        def keep(leaf: Any) -> Any:
            whole = leaf.addressable_data(0) if is_key(leaf) else multihost.to_host(leaf)
            return whole if self.writes else None

        return jax.tree.map(keep, tree)

    def own_copy(self, tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        if not all(leaf.is_fully_replicated for leaf in leaves):
            return None
        return jax.tree.unflatten(treedef, [leaf.addressable_data(0) for leaf in leaves])

    def first(self, do: Callable[[], Any]) -> Any:
        return multihost.first_alone(do)

    def require_same(self, values: Mapping[str, str]) -> None:
        problems = [
            f"{name}: {_named(processes)} differ{'s' * (len(processes) == 1)} from process 0"
            for name, processes in multihost.unequal(values).items()
        ]
        if problems:
            raise ConfigError(
                "the processes of this run",
                got=problems,
                expected="the same command with the same files in every process",
                fix="Use a shared file system, or copy model, data and run folder to all "
                "hosts; use the same versions everywhere.",
            )

    def start_max(self, number: int) -> Any:
        own = np.array([number], np.int32)
        return _compiled_max()(jax.make_array_from_process_local_data(_one_each(), own))


def process_group() -> ProcessGroup:
    """Return the processes that `jax.distributed` has joined, or this process."""
    return ProcessGroup() if jax.process_count() == 1 else _Joined()


@functools.lru_cache(maxsize=32)
def _rows_here(sharding: NamedSharding, rows: int) -> np.ndarray:
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts if part is not None]))


def _put(leaf: Any, sharding: Any) -> Any:
    if isinstance(leaf, jax.Array) and (not leaf.is_fully_addressable or is_key(leaf)):
        return jax.device_put(leaf, sharding)
    # `device_put` would send the whole array between processes, to compare it.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf is an array of random keys."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jax.dtypes.prng_key)


def _named(processes: list[int]) -> str:
    one = len(processes) == 1
    return f"process{'' if one else 'es'} {', '.join(map(str, processes))}"


@functools.cache
def _one_each() -> NamedSharding:
    """Return the sharding of one element on the first device of each process."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[index] for index in sorted(first)]), ("process",))
    return NamedSharding(mesh, PartitionSpec("process"))


@functools.cache
def _compiled_max() -> Any:
    everywhere = NamedSharding(_one_each().mesh, PartitionSpec())
    return jax.jit(jnp.max, out_shardings=everywhere)
