"""What the tests of the transform share: a merged reference, and how to hold a function to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

import jax_lora as jl
from jax_lora.lowrank import accumulation_dtype
from jax_lora.pair import dense_delta


def randomized(adapter: Any, seed: int = 0, size: float = 0.3) -> Any:
    """The same adapter with no zero in it."""
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        (size * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def merged_tree(tree: Any, adapter: Any) -> Any:
    """The merged weights by plain formulas: the reference that everything is held against."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for key_path, leaf in flat:
        path = jl.paths.format_path(key_path)
        if path in adapter.pairs:
            wide = accumulation_dtype(leaf.dtype)
            pair = adapter.pairs[path]
            formed = leaf.astype(wide) + dense_delta(pair, wide)
            if pair.magnitude is not None:
                formed = rescaled(formed, pair)
            leaf = formed.astype(leaf.dtype)
        leaves.append(adapter.whole.get(path, leaf))
    return jax.tree.unflatten(treedef, leaves)


def rescaled(formed: Any, pair: Any) -> Any:
    """m * V / ||V|| by NumPy's own words: the reference for magnitudes."""
    squares = jnp.sum(formed**2, axis=pair.in_axes, keepdims=True)
    norms = jax.lax.stop_gradient(jnp.sqrt(squares))
    kept = [axis for axis in range(formed.ndim) if axis not in pair.in_axes]
    order = [(*pair.stack_axes, *pair.out_axes).index(axis) for axis in kept]
    magnitude = pair.magnitude.astype(formed.dtype).transpose(order)
    return magnitude.reshape(norms.shape) / norms * formed


def random_tree(shapes: Any, seed: int = 1, dtype: Any = jnp.float32) -> Any:
    """A tree of Gaussian arrays from a tree of shapes."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        (jax.random.normal(key, shape) / np.sqrt(max(shape[0], 1))).astype(dtype)
        for key, shape in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def adapt(fn: Any, tree: Any, *args: Any, **config: Any) -> Any:
    """A random adapter over whatever `find_kernels` reports, all of it by default."""
    kernels = jl.find_kernels(fn, tree, *args)
    config.setdefault("targets", list(kernels))
    config.setdefault("rank", 2)
    settings = jl.LoraConfig(**config)
    return randomized(jl.lora_init(jax.random.key(0), tree, settings, kernels=kernels))


def assert_equals_merged(
    fn: Any,
    tree: Any,
    *args: Any,
    adapter: Any = None,
    on_materialize: str = "error",
    rtol: float = 1e-5,
    gradient_rtol: float = 1e-4,
) -> None:
    """Hold values and derivatives of fn, in every form, against the merged weights'."""
    adapter = adapt(fn, tree, *args) if adapter is None else adapter

    def ours(form: str) -> Any:
        with_lora = jl.lora_apply(fn, on_materialize=on_materialize, form=form)
        return lambda each: with_lora(jl.combine(tree, each), *args)

    theirs = lambda each: fn(merged_tree(tree, each), *args)  # noqa: E731
    tangent = randomized(adapter, seed=7)
    cotangent = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(5), leaf.shape).astype(leaf.dtype),
        jax.eval_shape(theirs, adapter),
    )

    @jax.jit  # one program for all sides and all derivatives: compiling is what tests wait for
    def everything() -> Any:
        return [
            (*jax.jvp(f, (adapter,), (tangent,)), jax.vjp(f, adapter)[1](cotangent))
            for f in (theirs, ours("factored"), ours("merged"))
        ]

    (value_, forward_, reverse_), *every_form = everything()
    for value, forward, reverse in every_form:
        assert_close(value, value_, rtol)
        assert_close(forward, forward_, gradient_rtol)
        assert_close(reverse, reverse_, gradient_rtol)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program and of the programs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def assert_close(got: Any, want: Any, rtol: float) -> None:
    """Compare trees leaf by leaf, relative to each leaf's largest entry."""
    got_leaves, got_tree = jax.tree.flatten(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree
    for g, w in zip(got_leaves, want_leaves, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(
            g, w, rtol=rtol, atol=rtol * max(np.abs(w).max(initial=0), 1e-30)
        )


def assert_bitwise(got: Any, want: Any) -> None:
    """Compare trees bit by bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()
