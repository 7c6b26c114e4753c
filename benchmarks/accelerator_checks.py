"""Compare attention kernels and `lora_apply` with float32 references, on the present device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from benchmarks.recorder import Recorder
from jax_lora.models.attention import attend
from jax_lora.models.attention_mask import BLOCKS, CUDNN, DENSE, SPLASH, make_masks
from jax_lora.models.decoder_inputs import MaskInputs

# The largest relative error of a correct bfloat16 kernel is about 0.01.
MOST_ERROR = 0.02
KERNELS = {"cpu": (DENSE, BLOCKS), "gpu": (DENSE, CUDNN, BLOCKS), "tpu": (DENSE, SPLASH, BLOCKS)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask.

    Args:
      tokens: Sequence length.
      packed: Whether a sequence consists of several segments.
      padded: Whether the sequences end with padding.
      window: Number of visible keys; None: all.
      soft_cap: Soft cap on the scores; None: no cap.
    """

    tokens: int
    packed: bool = False
    padded: bool = False
    window: int | None = None
    soft_cap: float | None = None


def cases(tokens: int) -> dict[str, Case]:
    """Return the cases for a sequence length."""
    return {
        "causal": Case(tokens),
        "odd length": Case(tokens - 1),
        "padded": Case(tokens, padded=True),
        "packed": Case(tokens, packed=True),
        "packed, padded, odd length": Case(tokens - 3, packed=True, padded=True),
        "window": Case(tokens, window=tokens // 4),
        "packed, window": Case(tokens, packed=True, window=tokens // 4),
        "soft cap": Case(tokens, soft_cap=30.0),
    }


def check_attention(recorder: Recorder, rehearse: bool) -> None:
    """Record the errors of every kernel in every case that it supports."""
    tokens, heads, groups, channels = (64, 4, 2, 16) if rehearse else (1024, 16, 4, 128)
    listed, kernels = cases(tokens), KERNELS[jax.default_backend()]
    if rehearse:  # each case compiles for seconds
        listed = {name: listed[name] for name in ("packed, padded, odd length", "soft cap")}
        kernels = kernels[-1:]
    for kernel in kernels:
        for name, case in listed.items():
            if kernel == CUDNN and case.soft_cap:
                continue
            recorder.run(
                "attention",
                f"{kernel}, {name}",
                lambda kernel=kernel, case=case: _attention_errors(
                    kernel, case, heads, groups, channels
                ),
            )


def _attention_errors(
    kernel: str, case: Case, heads: int, groups: int, channels: int
) -> dict[str, Any]:
    batch, tokens = 2, case.tokens
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        rng.normal(size=(batch, tokens, n, channels)).astype(jnp.bfloat16)
        for n in (heads, groups, groups, heads)
    )
    place = np.arange(tokens, dtype=np.int32)
    ends = np.array([[tokens - tokens // 8], [tokens // 2]], np.int32)
    real = place < ends if case.padded else np.ones((batch, tokens), bool)
    starts = np.array([[tokens // 5], [tokens // 3]], np.int32)
    segments = ((place >= starts) * 1 + (place >= 2 * starts)).astype(np.int32)
    given: MaskInputs = (
        jnp.asarray(real, jnp.int32) if case.padded else None,
        jnp.asarray(segments) if case.packed else None,
        None,
    )
    dy = dy * real[:, :, None, None].astype(dy.dtype)  # outputs at padding are not defined

    def results(kernel: str, dtype: Any) -> tuple[jax.Array, ...]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
            (mask,) = make_masks(kernel, tokens, tokens, given, [case.window], dtype)
            y, backward = jax.vjp(
                lambda q, k, v: attend(q, k, v, mask, soft_cap=case.soft_cap), q, k, v
            )
            return y * real[:, :, None, None].astype(y.dtype), *backward(dy)

        return jax.jit(run)(*(x.astype(dtype) for x in (q, k, v, dy)))

    with jax.default_matmul_precision("highest"):
        reference = results(DENSE, jnp.float32)
    found = results(kernel, jnp.bfloat16)
    names = ("y", "dq", "dk", "dv")
    return _judge(dict(zip(names, map(_error, found, reference), strict=True)))


def _error(found: Any, reference: Any) -> float:
    """Return the relative error in the Frobenius norm."""
    ours, theirs = (np.asarray(x, np.float32) for x in (found, reference))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _judge(errors: dict[str, float]) -> dict[str, Any]:
    right = all(error <= MOST_ERROR for error in errors.values())  # False for NaN
    return {**errors, "right": right}


def check_lora(recorder: Recorder, rehearse: bool) -> None:
    """Record the errors of each form of `lora_apply`, and those of merged bfloat16 weights."""
    width = 64 if rehearse else 2048
    for form in ("auto",) if rehearse else ("auto", "factored", "merged"):
        recorder.run("lora_apply", form, lambda form=form: _lora_errors(form, width))
    recorder.run("lora_apply", "jl.merge", lambda: _merge_error(width))


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Two layers, an adapter with nonzero factors, an input, and float32 references."""

    base: Any
    adapter: jl.Adapter
    x: jax.Array
    y: jax.Array
    gradient: Any


def _model(variables: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ variables["up"]) @ variables["down"]


@functools.cache
def _layers(width: int) -> _Layers:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.bfloat16)

    base = {"up": draw(width, 2 * width), "down": draw(2 * width, width)}
    x = draw(2, width, width)
    config = jl.LoraConfig(rank=16, alpha=16.0, targets=("up", "down"))
    kernels = jl.find_kernels(_model, base, x)
    empty = jl.lora_init(jax.random.key(0), base, config, kernels=kernels)
    pairs = {
        path: dataclasses.replace(pair, b=draw(*pair.b.shape).astype(jnp.float32))
        for path, pair in empty.pairs.items()
    }
    adapter = dataclasses.replace(empty, pairs=pairs)

    def plain(factors: Any) -> tuple[jax.Array, jax.Array]:
        # Alpha equals the rank, so the scale is 1.
        merged = {
            name: base[name].astype(jnp.float32) + factors[name][0] @ factors[name][1]
            for name in base
        }
        y = _model(merged, x.astype(jnp.float32))
        return jnp.sum(y * y), y

    factors = {path: (pair.a, pair.b) for path, pair in pairs.items()}
    with jax.default_matmul_precision("highest"):
        gradient, y = jax.jit(jax.grad(plain, has_aux=True))(factors)
    return _Layers(base, adapter, x, y, gradient)


def _lora_errors(form: Any, width: int) -> dict[str, Any]:
    layers = _layers(width)
    apply: Callable[..., jax.Array] = jl.lora_apply(_model, form=form)

    def loss(adapter: jl.Adapter, base: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = apply(jl.combine(base, adapter), x)
        wide = y.astype(jnp.float32)
        return jnp.sum(wide * wide), y

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradient, y = run(layers.adapter, layers.base, layers.x)
    errors = {"y": _error(y, layers.y)}
    for path, pair in gradient.pairs.items():
        errors[f"d{path} a"] = _error(pair.a, layers.gradient[path][0])
        errors[f"d{path} b"] = _error(pair.b, layers.gradient[path][1])
    return _judge(errors)


def _merge_error(width: int) -> dict[str, Any]:
    layers = _layers(width)
    merged = jl.merge(layers.base, layers.adapter)
    return _judge({"y": _error(jax.jit(_model)(merged, layers.x), layers.y)})
