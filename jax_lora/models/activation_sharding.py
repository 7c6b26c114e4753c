"""Keep activations on the devices of their rows, on a mesh.

Without it, XLA may replicate the rows of a batch instead of gathering the weights of a layer, and
it may shard queries, keys and values differently, which a fused attention kernel does not accept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_lora.models.mesh_sharding import TENSOR, row_spec

_MESH: ContextVar[Mesh | None] = ContextVar("activation_mesh", default=None)


@contextlib.contextmanager
def activation_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Set the mesh while a model is traced; None: nothing is pinned."""
    token = _MESH.set(None if mesh is None or mesh.size == 1 else mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def pin_rows(x: jax.Array) -> jax.Array:
    """Shard the first axis over `data` and `fsdp`, and no other axis: (rows, ...)."""
    mesh = _MESH.get()
    return x if mesh is None else pinned(x, mesh)


def pin_heads(x: jax.Array) -> jax.Array:
    """Also shard the heads over `tensor`, if it divides them: (rows, tokens, heads, channels)."""
    mesh = _MESH.get()
    if mesh is None:
        return x
    size = mesh.shape.get(TENSOR, 1)
    heads = TENSOR if size > 1 and x.shape[2] % size == 0 else None
    return pinned(x, mesh, None, heads)


def pinned(x: jax.Array, mesh: Mesh, *rest: str | None) -> jax.Array:
    """Constrain the first axis of x to the devices of its rows, and the other axes to `rest`."""
    rows = row_spec(mesh, x.shape[0])
    spec = PartitionSpec(*(tuple(rows) or (None,)), *rest)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
