"""What tests of other people's models share: adapt every kernel, compare, list what was formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from jax_lora.kernels.kernel import Kernel
from tests.lora_cases import assert_close, merged_tree


def assert_runs_adapted(
    fn: Any,
    tree: Any,
    *args: Any,
    formed: Mapping[str, str] | None = None,
    unseen: Sequence[str] = (),
    not_kernels: Sequence[str] = (),
) -> None:
    """Hold a model to its merged self, with a pair on every kernel that it has.

    Args:
      fn: The model as a function of its parameters and `args`.
      tree: The parameters.
      *args: The model's data.
      formed: The operation that forms a full weight by the leaf's path; all that there are.
      unseen: Matrices that `find_kernels` does not report; adapted as (in, out) all the same.
      not_kernels: Leaves of two axes or more, apart from biases and scales, that no contraction
        consumes.
    """
    kernels = jl.find_kernels(fn, tree, *args)
    leaves = dict(jl.paths.flatten_with_paths(tree)[0])
    missed = {path for path, leaf in leaves.items() if _is_matrix(path, leaf)} - set(kernels)
    assert missed == {*unseen, *not_kernels}, missed
    kernels |= {path: _matrix(path, leaves[path]) for path in unseen}
    adapter = random_adapter(tree, kernels)
    assert set(adapter.pairs) == set(kernels)
    sites = materialized(fn, tree, adapter, *args)
    assert sites == (formed or {}), sites
    assert_equals_its_merged_self(fn, tree, adapter, *args)


def _is_matrix(path: str, leaf: Any) -> bool:
    vector = path.split("/")[-1] in ("b", "bias", "scale", "offset")  # in a stack: two axes
    return leaf.ndim > 1 and not vector and jnp.issubdtype(leaf.dtype, jnp.floating)


def _matrix(path: str, leaf: Any) -> Kernel:
    return Kernel(path, leaf.shape, leaf.dtype, "dense", in_axes=(0,), out_axes=(1,))


def random_adapter(tree: Any, kernels: Any) -> Any:
    """A pair of Gaussian factors for every kernel."""
    config = jl.LoraConfig(rank=2, targets=list(kernels))
    init = lambda tree: jl.lora_init(jax.random.key(0), tree, config, kernels=kernels)  # noqa: E731
    shapes = jax.eval_shape(init, tree)
    draw = np.random.default_rng(3).standard_normal
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw(leaf.shape), leaf.dtype), shapes)


def materialized(fn: Any, tree: Any, adapter: Any, *args: Any) -> dict[str, str]:
    """Map each leaf whose full weight is formed to the operations that ask for it."""
    operations: dict[str, set[str]] = {}
    for site in jl.explain(fn, jl.combine(tree, adapter), *args).sites:
        if site.form == "materialized":
            operations.setdefault(site.path, set()).add(site.operation)
    return {path: " ".join(sorted(names)) for path, names in operations.items()}


def assert_equals_its_merged_self(fn: Any, tree: Any, adapter: Any, *args: Any) -> None:
    """Compare values and the adapter's gradients, in both forms, with the merged weights'."""

    def ours(form: str) -> Any:
        with_lora = jl.lora_apply(fn, on_materialize="allow", form=form)
        return lambda each: with_lora(jl.combine(tree, each), *args)

    theirs = lambda each: fn(merged_tree(tree, each), *args)  # noqa: E731
    draw = np.random.default_rng(5).standard_normal
    cotangent = jax.tree.map(
        lambda leaf: jnp.asarray(draw(leaf.shape), leaf.dtype), jax.eval_shape(theirs, adapter)
    )

    @jax.jit  # one program for all sides: compiling is what these tests wait for
    def everything(adapter: Any) -> Any:
        sides = (theirs, ours("factored"), ours("merged"))
        results = [jax.vjp(side, adapter) for side in sides]
        return [(value, pull(cotangent)[0]) for value, pull in results]

    (value_, gradient_), *every_form = everything(adapter)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient_))  # every factor matters
    for value, gradient in every_form:
        assert_close(value, value_, 1e-5)
        assert_close(gradient, gradient_, 1e-4)


def drawn(shapes: Any, seed: int = 1) -> Any:
    """Fill a model's leaves: Gaussian kernels, vectors around one so that variances are above 0.

    NumPy draws them: an eager `init` compiles a program for every leaf.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if max(leaf.shape, default=1) == leaf.size:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        size = 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        return jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def data(*shape: int) -> jax.Array:
    """Gaussian data."""
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
