"""Optimizers that train an adapter and do not change a bit of any other leaf.

Leaves are frozen by a mask and not by zero gradients: weight decay, momentum and noise change a
leaf whose gradient is zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lora import updates
from jax_lora.adapter import Adapter, LoraWeight, is_adapted, not_combined
from jax_lora.errors import ConfigError

# -----------------------------------------------------------------------------------------------
# The mask
# -----------------------------------------------------------------------------------------------


def trainable_mask(lora_tree: Any) -> Any:
    """Return a mask that is True at the adapter weights of a tree and False elsewhere.

    Use it with `optax.masked`, `optax.multi_transform`, or in your own code that counts or clips.
    `masked_optimizer` covers the common case.

    Args:
      lora_tree: A tree from `combine`, a tree of its gradients, or an `Adapter`.

    Returns:
      A tree of bools with the same treedef.

    Raises:
      StructureError: The tree has no adapter.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> mask = trainable_mask(jl.combine(params, adapter))
      >>> mask["bias"], mask["kernel"].base, mask["kernel"].pair.a
      (False, False, True)
    """
    nodes, treedef = jax.tree.flatten(lora_tree, is_leaf=_is_part)
    if not any(map(_is_part, nodes)):
        expected = "a tree from jl.combine(variables, adapter), or an Adapter"
        raise not_combined("trainable_mask", expected)
    return jax.tree.unflatten(treedef, [_node_mask(node) for node in nodes])


def _is_part(node: Any) -> bool:
    return isinstance(node, (LoraWeight, Adapter, *updates.KINDS))


def _node_mask(node: Any) -> Any:
    if is_adapted(node):
        return dataclasses.replace(_filled(node, False), update=_filled(node.update, True))
    return _filled(node, _is_part(node))  # in an `Adapter` that is not combined, all is trainable


def _filled(tree: Any, value: bool) -> Any:
    return jax.tree.map(lambda _: value, tree)


# -----------------------------------------------------------------------------------------------
# The optimizer
# -----------------------------------------------------------------------------------------------


def masked_optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Restrict an Optax optimizer to the adapter weights of a combined tree.

    Use it if the whole tree from `combine` goes through the training step, as in
    `TrainState.create(params=lora_variables, tx=jl.masked_optimizer(optax.adamw(1e-4)))`. If the
    step differentiates only the adapter, `tx` itself is sufficient.

    The optimizer state has entries for trainable leaves only, and global transformations such as
    `optax.clip_by_global_norm` see only the gradients of trainable leaves. The update of a frozen
    leaf is a zero that `optax.apply_updates` adds without changing a bit, whatever the gradient
    of that leaf is. Call `update` and `apply_updates` in one jitted step, so that XLA removes the
    addition. (Without jit, additions on CPU flush subnormal values to zero.) Random keys do not
    support addition; exclude them: `nnx.split(model, nnx.Param, ...)`.

    Args:
      tx: Any Optax transformation, including `optax.MultiSteps` and transformations with extra
        arguments. A `value_fn` among these is called with the whole tree.

    Returns:
      A transformation whose `init` and `update` accept trees from `combine`, or an `Adapter`.

    Raises:
      ConfigError: `tx` is not an Optax transformation.
      StructureError: From `init` and `update`: the tree has no adapter.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jnp.ones((300, 400)), "bias": jnp.ones(400)}
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> state = masked_optimizer(optax.adamw(1e-4)).init(jl.combine(params, adapter))
      >>> sum(leaf.size for leaf in jax.tree.leaves(state)) == 1 + 2 * adapter.size
      True
    """
    inner = optax.masked(_as_transformation(tx), trainable_mask, mask_compatible_extra_args=True)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if callable(extra.get("value_fn")) and params is not None:
            extra["value_fn"] = _of_trainable(extra["value_fn"], params)
        changes, state = inner.update(updates, state, params, **extra)
        like = updates if params is None else params
        mask = trainable_mask(updates)
        return jax.tree.map(_change_or_nothing, mask, changes, like), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _as_transformation(tx: Any) -> optax.GradientTransformation:
    if isinstance(tx, optax.MultiSteps):
        return tx.gradient_transformation()
    if callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)):
        return tx
    raise ConfigError(
        "masked_optimizer: tx",
        got=f"{tx!r} of type {type(tx).__name__}",
        expected="an Optax transformation, which has init and update",
        fix="Pass an optimizer, as in jl.masked_optimizer(optax.adamw(1e-4)).",
    )


def _of_trainable(value_fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Wrap a function of the whole tree for a line search, which passes trainable leaves only."""
    mask = trainable_mask(params)

    @functools.wraps(value_fn)  # Optax inspects the argument names
    def call(trainable: Any, *args: Any, **kwargs: Any) -> Any:
        whole = jax.tree.map(lambda m, new, old: new if m else old, mask, trainable, params)
        return value_fn(whole, *args, **kwargs)

    return call


def _change_or_nothing(trainable: bool, change: Any, like: Any) -> Any:
    if trainable:
        return change
    if not hasattr(like, "dtype") or jnp.issubdtype(like.dtype, jax.dtypes.extended):
        return change  # random keys do not support addition
    if like.dtype == jax.dtypes.float0:
        return np.zeros(like.shape, bool)  # adding False changes no integer and promotes no type
    # x + 0.0 turns -0.0 into +0.0, while x + -0.0 is bitwise equal to x.
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        return jnp.full_like(like, complex(-0.0, -0.0))
    return jnp.full_like(like, -0.0 if jnp.issubdtype(like.dtype, jnp.floating) else 0)


# -----------------------------------------------------------------------------------------------
# LoRA+
# -----------------------------------------------------------------------------------------------


def lora_plus(tx: optax.GradientTransformation, ratio: float) -> optax.GradientTransformation:
    """Use a larger learning rate for the factors `b` than for the factors `a` (LoRA+).

    Use it around an optimizer that multiplies its updates by the learning rate last, such as
    AdamW, SGD or Lion. Wide models train best if the learning rate of `b` is several times larger.

    Args:
      tx: An Optax transformation.
      ratio: Learning rate of `b` divided by the learning rate of all other weights. The paper
        recommends 2 to 16.

    Returns:
      A transformation of an `Adapter`, or of a tree from `combine` inside `masked_optimizer`.

    Raises:
      ConfigError: The ratio is not a finite number above 0, or `tx` is not an Optax
        transformation.

    Reference:
      Hayou et al., LoRA+ (arXiv:2402.12354), section 4.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> adapter = jl.lora_init(
      ...     jax.random.key(0), {"kernel": jnp.ones((3, 4))}, jl.LoraConfig(rank=2)
      ... )
      >>> tx = lora_plus(optax.sgd(0.5), 8.0)
      >>> ones = jax.tree.map(jnp.ones_like, adapter)
      >>> updates, _ = tx.update(ones, tx.init(adapter))
      >>> float(updates.pairs["kernel"].a[0, 0]), float(updates.pairs["kernel"].b[0, 0])
      (-0.5, -4.0)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < np.inf:
        raise ConfigError(
            "lora_plus: ratio",
            got=repr(ratio),
            expected="a finite number above 0",
            fix="Pass 1 for equal learning rates, or a value from 2 to 16.",
        )

    def faster(path: Any, leaf: Any) -> Any:
        is_b = bool(path) and getattr(path[-1], "name", None) == "b"
        return leaf * jnp.asarray(ratio, leaf.dtype) if is_b else leaf

    scaled = optax.stateless(lambda updates, _: jax.tree.map_with_path(faster, updates))
    return optax.chain(_as_transformation(tx), scaled)
