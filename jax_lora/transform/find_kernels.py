"""find_kernels: which leaves a function contracts, and along which of their axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora import paths
from jax_lora.adapter import is_adapted, is_weight
from jax_lora.errors import StructureError, format_error
from jax_lora.kernels.kernel import Kernels
from jax_lora.kernels.parameters import not_parameters
from jax_lora.transform.analyze import Analyze, Stream
from jax_lora.transform.programs import Body
from jax_lora.transform.record import Bar, Record


def find_kernels(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Kernels:
    """Report how a function uses the leaves of its first argument.

    Use it for `lora_init` wherever a kernel is more than a plain (in, out) matrix: stacked layers,
    heads, experts, embeddings, convolutions. It accepts `jax.ShapeDtypeStruct`s and allocates
    nothing. What it finds does not depend on what else the function returns.

    Args:
      fn: Any function of a tree of parameters, such as `model.apply`.
      tree: Its first argument. Only parameters are adapted: of Linen variables the collection
        `params`, of NNX state the variables of type `nnx.Param`, of any other tree all leaves.
      *args: Its other arguments, of any shape that it accepts.
      **kwargs: Its keyword arguments.

    Returns:
      A mapping from path to `Kernel` for each floating-point parameter that a contraction, an
      embedding lookup or a convolution uses. Its attribute `skipped` maps every other matrix that
      the function uses to the reason why no adapter can reach it.

    Raises:
      StructureError: The tree has an adapter already.

    Example:
      >>> import jax.numpy as jnp
      >>> def attend(params, x):  # (tokens, d) -> (tokens, heads, head_dim)
      ...     return jnp.einsum("td,dhk->thk", x, params["query"]) ** 2
      >>> params = {"query": jax.ShapeDtypeStruct((16, 4, 8), jnp.float32)}
      >>> kernel = find_kernels(attend, params, jnp.ones((2, 16)))["query"]
      >>> kernel.kind, kernel.in_axes, kernel.out_axes
      ('dense', (0,), (1, 2))
    """
    leaves, treedef = jax.tree.flatten((tree, args, kwargs), is_leaf=is_weight)
    named = _named_parameters(tree)
    data = [index for index, leaf in enumerate(leaves) if _is_data(leaf, index < len(named))]

    def program(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for index, array in zip(data, arrays, strict=True):
            filled[index] = array
        tree, args, kwargs = jax.tree.unflatten(treedef, filled)
        results = jax.tree.leaves(fn(tree, *args, **kwargs))
        return [leaf for leaf in results if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(program)(*[_stand_in(leaves[index]) for index in data])
    record = Record()
    others = not_parameters(tree)
    bars = {path: Bar(why, is_parameter=False) for path, why in others.items()}
    inputs = [
        record.leaf(
            named[index],
            leaves[index].shape,
            leaves[index].dtype,
            bars.get(named[index]) or _not_floating(leaves[index]),
        )
        if index < len(named)
        else Stream(math.prod(leaves[index].shape), external=True)
        for index in data
    ]
    analyze = Analyze(record)
    outputs = analyze.run(Body(closed.jaxpr, closed.consts), inputs)
    results = [analyze.materialized(value, None, "return") for value in outputs]
    return record.results([stream.heads for stream in results])


def _named_parameters(tree: Any) -> list[str]:
    named = paths.flatten_with_paths(tree, is_leaf=is_weight)[0]
    for path, leaf in named:
        if is_adapted(leaf):
            raise StructureError(
                format_error(
                    f"find_kernels: {path}",
                    got="a leaf that has an adapter already",
                    expected="plain parameters",
                    fix="Take the adapter off first: variables, adapter = jl.partition(tree).",
                )
            )
    return [path for path, _ in named]


def _is_data(leaf: Any, is_parameter: bool) -> bool:
    array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or is_weight(leaf)
    return array or (is_parameter and hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _stand_in(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_weight(leaf) else leaf


def _not_floating(leaf: Any) -> Bar | None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jnp.floating):
        return None
    return Bar(f"its type is {dtype}, and adapters are real floating-point updates", True)
