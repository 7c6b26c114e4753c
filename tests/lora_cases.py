"""What the tests of the transform share: a merged reference, and how to hold a function to it."""

from __future__ import annotations

import functools
import string
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

import jax_lora as jl


def randomized(adapter: Any, seed: int = 0, size: float = 0.3) -> Any:
    """The same adapter with no zero in it; of shapes, an adapter of these shapes."""
    rng = np.random.default_rng(seed)  # JAX's own would compile a function for every shape
    draw = lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, adapter)


def merged_tree(tree: Any, adapter: Any) -> Any:
    """The tree with the merged weights in it: the reference for every test of the transform.

    Only the arrays, axes and scales of the adapter are read; the formulas are written out here, so
    that a fault of the library cannot be in the reference as well.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for key_path, leaf in flat:
        path = jl.paths.format_path(key_path)
        if path in adapter.pairs:
            leaf = merged_weight(leaf, adapter.pairs[path])
        if path in adapter.rows:
            rows = adapter.rows[path]
            leaf = leaf.at[jnp.array(rows.indices)].set(rows.values.astype(leaf.dtype))
        leaves.append(adapter.whole.get(path, leaf))
    return jax.tree.unflatten(treedef, leaves)


def merged_weight(weight: Any, pair: Any) -> Any:
    """W0 + scale * a @ b by one einsum, in float32 or float64, and rounded once to W0's type.

    With a magnitude m it is m * V / ||V||, where V is that sum. The norm is taken over the inputs
    and is a constant for differentiation. A bias of the pair is not part of the weight.
    """
    wide = jnp.float64 if weight.dtype == jnp.float64 else jnp.float32
    letters = lambda axes: "".join(string.ascii_lowercase[axis] for axis in axes)  # noqa: E731
    stack, every = letters(pair.stack_axes), letters(range(weight.ndim))
    inputs, outputs = letters(pair.in_axes), letters(pair.out_axes)
    terms = f"{stack}{inputs}Z,{stack}Z{outputs}"  # Z is the rank
    factors, scale = (pair.a.astype(wide), pair.b.astype(wide)), jnp.asarray(pair.scale, wide)
    product = functools.partial(jnp.einsum, precision="highest")
    if scale.ndim:  # (*stack,)
        delta = product(f"{terms},{stack}->{every}", *factors, scale)
    else:
        delta = product(f"{terms}->{every}", *factors) * scale
    formed = weight.astype(wide) + delta
    if pair.magnitude is not None:
        squares = jnp.sum(formed**2, axis=pair.in_axes, keepdims=True)
        norms = jax.lax.stop_gradient(jnp.sqrt(squares))
        ones = jnp.ones_like(formed)  # spread along the inputs, in the order of W0's axes
        magnitude = product(f"{stack}{outputs},{every}->{every}", pair.magnitude.astype(wide), ones)
        formed = magnitude / norms * formed
    return formed.astype(weight.dtype)


def random_tree(shapes: Any, seed: int = 1, dtype: Any = jnp.float32) -> Any:
    """A tree of Gaussian arrays from a tree of shapes."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> Any:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(max(shape[0], 1)), dtype)

    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def adapt(fn: Any, tree: Any, *args: Any, **config: Any) -> Any:
    """A random adapter over whatever `find_kernels` reports, all of it by default."""
    kernels = jl.find_kernels(fn, tree, *args)
    config.setdefault("targets", list(kernels))
    config.setdefault("rank", 2)
    settings = jl.LoraConfig(**config)
    init = lambda tree: jl.lora_init(jax.random.key(0), tree, settings, kernels=kernels)  # noqa: E731
    return randomized(jax.eval_shape(init, tree))


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
    cotangent = randomized(jax.eval_shape(theirs, adapter), seed=5, size=1.0)

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


def jit_by_operation(fn: Any) -> Any:
    """Jit without kernels that join operations, which round differently on some CPUs.

    XLA of jax 0.12 gives a product and what surrounds it to a library, if the CPU allows it.
    What it joins depends on the whole program, so a product has other bits in another program.
    """
    joins = jax.__version_info__ >= (0, 12)
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if joins else {}
    return jax.jit(fn, compiler_options=options)


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
