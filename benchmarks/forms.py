"""Implementations of fine-tuning for one decoder, with the same weights and factors."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jax_lora as jl
from benchmarks import products, trees
from benchmarks.decoder import PROJECTIONS, Decoder, DenseFactory, Size, next_token_loss

# {"params/block_0/q_proj/kernel": (a, b), ...}
Factors = dict[str, tuple[Any, Any]]


class UnavailableError(Exception):
    """A row is not available; the message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its batch and the LoRA settings.

    Args:
      size: Sizes of the decoder and of the batch.
      rank: LoRA rank.
      alpha: Numerator of the scale.
      scan: Whether to stack the blocks with `nn.scan`.
      remat: Name of a rematerialization policy.
      dtype: Dtype of the base weights and of the computation; factors are float32.
      fused: Whether to use a fused attention kernel.
    """

    size: Size
    rank: int = 8
    alpha: float = 16.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    fused: bool = False

    @property
    def scale(self) -> float:
        """The scale, alpha / rank."""
        return self.alpha / self.rank

    def decoder(self, dense: DenseFactory | None = None) -> Decoder:
        """Build the model, by default with `nn.Dense` layers."""
        if dense is None:
            types = {"dtype": self.dtype, "param_dtype": self.dtype}
            dense = functools.partial(nn.Dense, use_bias=False, **types)
        return Decoder(self.size, dense, self.scan, self.remat, self.dtype, self.fused)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The initial weights of all rows.

    Args:
      base: Variables of the plain decoder.
      factors: Nonzero (a, b) by the path of their kernel.
      tokens: (batch, length).
    """

    base: Any
    factors: Factors
    tokens: Any


jax.tree_util.register_dataclass(Weights, ["base", "factors", "tokens"], [])


def make_weights(case: Case, seed: int = 0) -> Weights:
    """Draw weights, factors and tokens with the shapes of `abstract_weights`."""
    shapes = abstract_weights(case)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        # One small function per shape; a single large one takes minutes to compile.
        return _normal(next(keys), shape.shape, shape.dtype)

    def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.ones(shape.shape, shape.dtype) if path.endswith("scale") else draw(shape)

    flat = trees.flatten(shapes.base)
    base = trees.unflatten({path: leaf(path, each) for path, each in flat.items()})
    factors = {path: (draw(a), draw(b)) for path, (a, b) in shapes.factors.items()}
    size = case.size
    tokens = jax.random.randint(next(keys), (size.batch, size.length), 0, size.vocabulary)
    return Weights(base, factors, tokens)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)


def abstract_weights(case: Case) -> Weights:
    """Return the shapes of the weights without allocating them."""
    size = case.size
    tokens = jax.ShapeDtypeStruct((size.batch, size.length), jnp.int32)
    base = jax.eval_shape(case.decoder().init, jax.random.key(0), tokens)
    factors = {
        path: (_struct(*stack, inputs, case.rank), _struct(*stack, case.rank, outputs))
        for path, kernel in trees.flatten(base).items()
        if any(name in path.split("/") for name in PROJECTIONS)
        for *stack, inputs, outputs in [kernel.shape]
    }
    return Weights(base, factors, tokens)


def _struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Form:
    """An implementation of fine-tuning.

    Args:
      loss: `loss(trainable, frozen, tokens)` -> scalar.
      trainable: The trainable parameters.
      frozen: The frozen parameters.
      gradients: Extracts (da, db) by path from the gradient of `trainable`.
    """

    loss: Callable[[Any, Any, Any], jax.Array]
    trainable: Any
    frozen: Any
    gradients: Callable[[Any], Factors]


Builder = Callable[[Case, Weights], Form]


# -----------------------------------------------------------------------------------------------
# Full fine-tuning
# -----------------------------------------------------------------------------------------------


def full(case: Case, weights: Weights, model: Decoder | None = None) -> Form:
    """Train every parameter, starting from W0 + scale * a @ b."""
    model = case.decoder() if model is None else model

    def loss(params: Any, frozen: Any, tokens: Any) -> jax.Array:
        return next_token_loss(model.apply(params, tokens), tokens)  # type: ignore[arg-type]

    def gradients(gradient: Any) -> Factors:
        flat = trees.flatten(gradient)
        return {
            path: (
                case.scale * flat[path] @ jnp.swapaxes(b, -1, -2),
                case.scale * jnp.swapaxes(a, -1, -2) @ flat[path],
            )
            for path, (a, b) in weights.factors.items()
        }

    return Form(loss, _merged(case, weights), {}, gradients)


def _merged(case: Case, weights: Weights) -> Any:
    def merge(base: Any, factors: Factors) -> Any:
        flat = trees.flatten(base)
        for path, (a, b) in factors.items():
            flat[path] = (flat[path] + case.scale * a @ b).astype(flat[path].dtype)
        return trees.unflatten(flat)

    shapes_only = isinstance(weights.tokens, jax.ShapeDtypeStruct)
    # Always copy, because the step donates its trainable parameters.
    copy = lambda base: jax.tree.map(jnp.copy, base)  # noqa: E731
    run = jax.eval_shape if shapes_only else lambda f, *args: f(*args)
    return run(lambda base, factors: copy(merge(base, factors)), weights.base, weights.factors)


def full_flat(case: Case, weights: Weights) -> Form:
    """Full fine-tuning with batch and sequence axes flattened."""
    return full(
        case, weights, case.decoder(functools.partial(products.FlatDense, dtype=case.dtype))
    )


# -----------------------------------------------------------------------------------------------
# LoRA written into the model
# -----------------------------------------------------------------------------------------------


def hand_written(product: products.Product, case: Case, weights: Weights) -> Form:
    """LoRA written into the dense layer."""
    settings = {"rank": case.rank, "scale": case.scale, "product": product, "dtype": case.dtype}
    model = case.decoder(functools.partial(products.LoraDense, **settings))

    def loss(lora: Any, base: Any, tokens: Any) -> jax.Array:
        return next_token_loss(model.apply({**base, "lora": lora}, tokens), tokens)  # type: ignore[arg-type]

    inside = {
        path: path.removeprefix("params/").removesuffix("/kernel") for path in weights.factors
    }
    lora = {
        f"{inside[path]}/{name}": factor
        for path, pair in weights.factors.items()
        for name, factor in zip("ab", pair, strict=True)
    }

    def gradients(gradient: Any) -> Factors:
        flat = trees.flatten(gradient)
        return {path: (flat[f"{inner}/a"], flat[f"{inner}/b"]) for path, inner in inside.items()}

    return Form(loss, trees.unflatten(lora), weights.base, gradients)


# -----------------------------------------------------------------------------------------------
# jax_lora
# -----------------------------------------------------------------------------------------------


def ours(form: str, case: Case, weights: Weights) -> Form:
    """The plain model with `lora_apply`."""
    model = case.decoder()
    if "form" in inspect.signature(jl.lora_apply).parameters:
        apply = jl.lora_apply(model.apply, form=form)  # type: ignore[call-arg]
    elif form == "auto":
        apply = jl.lora_apply(model.apply)
    else:
        raise UnavailableError("this version of lora_apply has no argument form")

    def loss(adapter: Any, base: Any, tokens: Any) -> jax.Array:
        return next_token_loss(apply(jl.combine(base, adapter), tokens), tokens)

    return Form(loss, _adapter(case, weights), weights.base, _pair_gradients)


def _adapter(case: Case, weights: Weights) -> jl.Adapter:
    config = jl.LoraConfig(rank=case.rank, alpha=case.alpha, targets=PROJECTIONS)
    kernels = jl.find_kernels(case.decoder().apply, weights.base, weights.tokens)
    key = jax.random.key(0)
    empty = jax.eval_shape(lambda: jl.lora_init(key, weights.base, config, kernels=kernels))
    if set(empty.pairs) != set(weights.factors):
        raise RuntimeError(f"adapted {sorted(empty.pairs)}, expected {sorted(weights.factors)}")
    pairs = {
        path: dataclasses.replace(pair, a=weights.factors[path][0], b=weights.factors[path][1])
        for path, pair in empty.pairs.items()
    }
    return dataclasses.replace(empty, pairs=pairs)


def _pair_gradients(gradient: jl.Adapter) -> Factors:
    return {path: (pair.a, pair.b) for path, pair in gradient.pairs.items()}
