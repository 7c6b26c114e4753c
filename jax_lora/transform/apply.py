"""lora_apply: any function of parameters, run on parameters that carry an adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jax_lora.adapter import is_adapted, is_weight
from jax_lora.algebra.base_weight import Recipe
from jax_lora.algebra.low_rank import LowRank
from jax_lora.transform.evaluate import Evaluate
from jax_lora.transform.programs import Body
from jax_lora.transform.sites import Settings
from jax_lora.transform.strategies import Strategy, target_platform


def lora_apply(
    fn: Callable[..., Any],
    *,
    on_materialize: str = "warn",
    form: str = "auto",
    platform: str | None = None,
) -> Callable[..., Any]:
    """Turn `model.apply`, or any function, into its LoRA version.

    The result accepts the same arguments, with leaves from `combine` anywhere among them. It
    computes what `fn` computes on the merged weights W0 + scale * a @ b: where such a leaf is used
    in a contraction, x · W0 + scale * (x · a) · b, and no gradient of W0's size is ever computed.
    Kernels that read the same x share their down-projections. `fn` is traced as by `jax.jit`; wrap
    the call in `jax.jit` for speed. W0 is behind `stop_gradient`.

    Args:
      fn: The function. Static arguments, `method=`, `mutable=` and `rngs=` work as before: whatever
        is not a JAX array is passed on unchanged.
      on_materialize: What to do where an operation has no low-rank rule and the full weight has to
        be materialized: `"warn"` once per site, `"error"`, or `"allow"`.
      form: How contractions are computed. `"auto"` decides for each by its shapes and types;
        `"factored"` and `"merged"` pin the two forms of `jax_lora/transform/strategies.py`, of
        which the second gives way where it would round the update off. `explain` shows the choice.
      platform: The target: `"cpu"`, `"gpu"` or `"tpu"`. By default the platform of the inputs, or
        the default backend inside `jax.jit`. Pass it to compile for a device that is not there.

    Returns:
      A function with `fn`'s signature.

    Raises:
      ConfigError: An unknown `on_materialize`, `form` or `platform`.
      MaterializeError: From the result, under `on_materialize="error"`.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), equation 3: h = W0 x + (alpha / r) B A x.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> model = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> params, x = {"kernel": jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> y = jl.lora_apply(model)(jl.combine(params, adapter), x)
      >>> bool((y == model(params, x)).all())  # b is zero: the base model, bit by bit
      True
    """
    return with_settings(fn, Settings(on_materialize, form, platform))


def with_settings(fn: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """Do what `lora_apply` does, with settings that the caller keeps.

    Args:
      fn: The function.
      settings: What was asked for; afterwards it holds what was done.

    Returns:
      A function with `fn`'s signature.
    """

    @functools.wraps(fn)
    def with_lora(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_weight)
        if not any(map(is_weight, leaves)):
            return fn(*args, **kwargs)
        data = [index for index, leaf in enumerate(leaves) if _is_data(leaf)]
        program = _Program(fn, leaves, treedef, data)
        closed = jax.make_jaxpr(program)(*[_stand_in(leaves[index]) for index in data])
        platform = settings.platform or target_platform(jax.tree.leaves((args, kwargs)))
        evaluator = Evaluate(settings, Strategy(platform, settings.form))
        inputs = [_value(leaves[index]) for index in data]
        outputs = evaluator.run(Body(closed.jaxpr, closed.consts), inputs)
        return program.rebuild(evaluator.dense(outputs, None, "return"))

    return with_lora


class _Program:
    """`fn` as a function of its arrays alone, and back from its arrays to its result."""

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], treedef: Any, data: list[int]):
        self._fn, self._leaves, self._treedef, self._data = fn, leaves, treedef, data
        self._result: tuple[list[Any], Any] | None = None

    def __call__(self, *arrays: jax.Array) -> list[jax.Array]:
        leaves = list(self._leaves)
        for index, array in zip(self._data, arrays, strict=True):
            leaves[index] = array
        args, kwargs = jax.tree.unflatten(self._treedef, leaves)
        results, treedef = jax.tree.flatten(self._fn(*args, **kwargs))
        returned = [leaf for leaf in results if isinstance(leaf, jax.Array)]
        # What is no array (a string, a Python number) is handed through as it is.
        self._result = (
            [None if isinstance(leaf, jax.Array) else (leaf,) for leaf in results],
            treedef,
        )
        return returned

    def rebuild(self, arrays: list[Any]) -> Any:
        """Put the arrays that were computed back into the structure that `fn` returned."""
        if self._result is None:
            raise RuntimeError("rebuild is for after the program has been traced")
        kept, treedef = self._result
        remaining = iter(arrays)
        return jax.tree.unflatten(
            treedef, [next(remaining) if leaf is None else leaf[0] for leaf in kept]
        )


def _is_data(leaf: Any) -> bool:
    return is_weight(leaf) or isinstance(leaf, jax.Array)


def _stand_in(leaf: Any) -> Any:
    """Return an array, or the shape and type of one, for `fn` to be traced with."""
    base = leaf.base if is_adapted(leaf) else leaf
    return jax.ShapeDtypeStruct(base.shape, base.dtype) if isinstance(base, Recipe) else base


def _value(leaf: Any) -> Any:
    """Return what the interpretation computes with: an array or a low-rank value."""
    if isinstance(leaf, Recipe):
        frozen = jax.tree.map(jax.lax.stop_gradient, leaf)
        return LowRank(frozen, tuple(range(leaf.ndim)), "a base without an adapter")
    if is_adapted(leaf):
        return leaf.update.applied(leaf.base, leaf.path, leaf.dropout_key, leaf.config.dropout)
    return leaf
