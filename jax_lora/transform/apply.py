"""lora_apply: run any function of parameters on a combined tree."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jax_lora.adapter import is_adapted, is_weight
from jax_lora.algebra.base_weight import Recipe
from jax_lora.algebra.low_rank import LowRank
from jax_lora.transform.evaluate import Evaluate
from jax_lora.transform.sites import Settings
from jax_lora.transform.strategies import Strategy, target_platform
from jax_lora.transform.tracing import ArrayFunction


def lora_apply(
    fn: Callable[..., Any],
    *,
    on_materialize: str = "warn",
    form: str = "auto",
    platform: str | None = None,
) -> Callable[..., Any]:
    """Transform `model.apply`, or any other function, to accept parameters with an adapter.

    The returned function has the signature of `fn` and accepts leaves from `combine` anywhere in
    its arguments. Its result is that of `fn` on the merged weights W0 + scale * a @ b. A
    contraction with such a leaf is computed as x · W0 + scale * (x · a) · b, and no gradient of
    W0's size is computed. Kernels with the same input x share a down-projection. W0 is wrapped in
    `stop_gradient`. `fn` is traced on every call, so wrap the call in `jax.jit` for speed.

    Args:
      fn: The function. Static arguments, `method=`, `mutable=` and `rngs=` work as before: a value
        that is not a JAX array is passed on unchanged.
      on_materialize: What to do if an operation has no low-rank rule, so that the full weight is
        materialized: `"warn"` once per site, `"error"`, or `"allow"`.
      form: How contractions are computed. `"auto"` chooses by shapes, types and platform;
        `"factored"` and `"merged"` select one of the two forms of
        `jax_lora/transform/strategies.py`. Despite `"merged"`, a contraction is factored if merging
        would lose the update to rounding. `explain` shows the choices.
      platform: The target platform: `"cpu"`, `"gpu"` or `"tpu"`. By default the platform of the
        inputs, or the default backend inside `jax.jit`. Pass it to compile for another platform.

    Returns:
      A function with the signature of `fn`.

    Raises:
      ConfigError: `on_materialize`, `form` or `platform` is unknown.
      MaterializeError: From the returned function, under `on_materialize="error"`.

    Warns:
      MaterializeWarning: From the returned function, under `on_materialize="warn"`.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), equation 3: h = W0 x + (alpha / r) B A x.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> model = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> params, x = {"kernel": jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> y = jl.lora_apply(model)(jl.combine(params, adapter), x)
      >>> bool((y == model(params, x)).all())  # b is zero: bitwise equal to the base model
      True
    """
    return with_settings(fn, Settings(on_materialize, form, platform))


def with_settings(fn: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """Apply `lora_apply` with a `Settings` object, which records the sites."""

    @functools.wraps(fn)
    def with_lora(*args: Any, **kwargs: Any) -> Any:
        is_data = lambda _, leaf: is_weight(leaf) or isinstance(leaf, jax.Array)  # noqa: E731
        function = ArrayFunction(fn, args, kwargs, is_data, is_weight)
        if not any(map(is_weight, function.inputs.values())):
            return fn(*args, **kwargs)
        body = function.trace()
        platform = settings.platform or target_platform(jax.tree.leaves((args, kwargs)))
        evaluator = Evaluate(settings, Strategy(platform, settings.form))
        outputs = evaluator.run(body, list(map(_value, function.inputs.values())))
        return function.rebuild(evaluator.dense(outputs, None, "return"))

    return with_lora


def _value(leaf: Any) -> Any:
    """Return the array or low-rank value that `Evaluate` computes with."""
    if isinstance(leaf, Recipe):
        frozen = jax.tree.map(jax.lax.stop_gradient, leaf)
        return LowRank(frozen, tuple(range(leaf.ndim)), "a base without an adapter")
    if is_adapted(leaf):
        return leaf.update.applied(leaf.base, leaf.path, leaf.dropout_key, leaf.config.dropout)
    return leaf
