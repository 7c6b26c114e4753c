"""find_kernels: find the leaves that a function contracts, and the roles of their axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import is_weight, plain_leaves
from jax_lora.kernels.kernel import Kernels
from jax_lora.transform.analyze import Analyze, Stream
from jax_lora.transform.parameters import not_parameters
from jax_lora.transform.record import Leaf, Record, Uses
from jax_lora.transform.tracing import ArrayFunction


def find_kernels(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Kernels:
    """Find the kernels among the leaves of a function's first argument.

    Pass the result to `lora_init` if a kernel is not a plain (in, out) matrix: stacked layers,
    heads, experts, embeddings, convolutions. The function is traced on shapes and types, so
    `jax.ShapeDtypeStruct`s are sufficient and no array is allocated. The result does not depend on
    additional outputs of the function.

    Args:
      fn: Any function of a tree of parameters, such as `model.apply`.
      tree: Its first argument. Only parameters can be adapted: the collection `params` of Linen
        variables, variables of type `nnx.Param` of NNX state, all leaves of any other tree.
      *args: Its other arguments, of any shape that it accepts.
      **kwargs: Its keyword arguments.

    Returns:
      A mapping from path to `Kernel` for each floating-point parameter that is used in a
      contraction, an embedding lookup or a convolution. Its attribute `skipped` maps the path of
      every other matrix that the function uses to the reason why it cannot be adapted.

    Raises:
      StructureError: The tree already has an adapter.

    Example:
      >>> import jax.numpy as jnp
      >>> def attend(params, x):  # (tokens, d) -> (tokens, heads, head_dim)
      ...     return jnp.einsum("td,dhk->thk", x, params["query"]) ** 2
      >>> params = {"query": jax.ShapeDtypeStruct((16, 4, 8), jnp.float32)}
      >>> kernel = find_kernels(attend, params, jnp.ones((2, 16)))["query"]
      >>> kernel.kind, kernel.in_axes, kernel.out_axes
      ('dense', (0,), (1, 2))
    """
    named = [path for path, _ in plain_leaves("find_kernels", tree)]

    def is_array(index: int, leaf: Any) -> bool:
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or is_weight(leaf):
            return True
        return index < len(named) and hasattr(leaf, "shape") and hasattr(leaf, "dtype")

    function = ArrayFunction(fn, (tree, *args), kwargs, is_array, is_weight)
    record = Record()
    others = not_parameters(tree)
    inputs: list[Leaf | Stream] = []
    for index, leaf in function.inputs.items():
        if index < len(named):
            path, shape, dtype = named[index], tuple(leaf.shape), leaf.dtype
            why = others.get(path)
            if why is None and not jnp.issubdtype(dtype, jnp.floating):
                why = f"its type is {dtype}, and only real floating-point leaves can be adapted"
            record.uses[path] = Uses(shape, dtype, why, is_parameter=path not in others)
            inputs.append(Leaf(path, tuple(range(len(shape))), shape))
        else:
            inputs.append(Stream(math.prod(leaf.shape), external=True))
    analyze = Analyze(record)
    outputs = analyze.run(function.trace(), inputs)
    results = [analyze.materialized(value, None, "return") for value in outputs]
    return record.results([stream.heads for stream in results])
