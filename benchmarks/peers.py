"""Fine-tune the decoder with other JAX libraries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import trees
from benchmarks.decoder import PROJECTIONS, Size, attend, next_token_loss
from benchmarks.forms import Case, Factors, Form, UnavailableError, Weights

# -----------------------------------------------------------------------------------------------
# qwix
# -----------------------------------------------------------------------------------------------


def qwix_form(case: Case, weights: Weights) -> Form:
    """Wrap the plain Linen decoder with the LoRA provider of qwix."""
    try:
        import qwix  # type: ignore[import-not-found]
    except ImportError as problem:
        raise UnavailableError("qwix is not installed") from problem
    pattern = rf".*({'|'.join(PROJECTIONS)})"
    provider = qwix.LoraProvider(module_path=pattern, rank=case.rank, alpha=case.alpha)
    model: Any = qwix.apply_lora_to_model(case.decoder(), provider)

    def loss(lora: Any, base: Any, tokens: Any) -> jax.Array:
        # qwix does not cast the factors; float32 factors would promote the whole model to float32.
        narrow = {path: factor.astype(case.dtype) for path, factor in lora.items()}
        params = trees.unflatten({**trees.flatten(base["params"]), **narrow})
        return next_token_loss(model.apply({"params": params}, tokens), tokens)

    # qwix stores the factors next to their kernel: q_proj/kernel_lora_a.
    lora = {
        f"{path.removeprefix('params/')}_lora_{name}": factor
        for path, pair in weights.factors.items()
        for name, factor in zip("ab", pair, strict=True)
    }

    def gradients(gradient: Any) -> Factors:
        return {
            path: (gradient[f"{inner}_lora_a"], gradient[f"{inner}_lora_b"])
            for path in weights.factors
            for inner in [path.removeprefix("params/")]
        }

    return Form(loss, lora, weights.base, gradients)


# -----------------------------------------------------------------------------------------------
# nnx.LoRALinear
# -----------------------------------------------------------------------------------------------


class _Block(nnx.Module):
    def __init__(self, size: Size, rank: int, dtype: Any, rngs: nnx.Rngs):
        keys = size.key_heads * size.head_dim
        shapes = {
            "q_proj": (size.width, size.width), "k_proj": (size.width, keys),
            "v_proj": (size.width, keys), "o_proj": (size.width, size.width),
            "gate_proj": (size.width, size.hidden), "up_proj": (size.width, size.hidden),
            "down_proj": (size.hidden, size.width),
        }  # fmt: skip
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
        for name, (inputs, outputs) in shapes.items():
            options: dict[str, Any] = {
                "lora_rank": rank,
                "lora_dtype": dtype,
                "use_bias": False,
                **types,
            }
            setattr(self, name, nnx.LoRALinear(inputs, outputs, rngs=rngs, **options))
        self.attention_norm = nnx.RMSNorm(size.width, rngs=rngs, **types)
        self.feed_forward_norm = nnx.RMSNorm(size.width, rngs=rngs, **types)
        self.head_dim = size.head_dim

    def __call__(self, x: jax.Array) -> jax.Array:
        layer: Any = self
        split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # (b, t, h, d)  # noqa: E731
        h = self.attention_norm(x)
        attended = attend(split(layer.q_proj(h)), split(layer.k_proj(h)), split(layer.v_proj(h)))
        x = x + layer.o_proj(attended)
        h = self.feed_forward_norm(x)
        return x + layer.down_proj(nnx.silu(layer.gate_proj(h)) * layer.up_proj(h))


class _Decoder(nnx.Module):
    def __init__(self, size: Size, rank: int, dtype: Any, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": dtype}
        self.layers = size.layers
        self.embed = nnx.Embed(size.vocabulary, size.width, rngs=rngs, **types)
        for layer in range(size.layers):
            setattr(self, f"block_{layer}", _Block(size, rank, dtype, rngs))
        self.norm = nnx.RMSNorm(size.width, rngs=rngs, **types)
        self.head = nnx.Linear(size.width, size.vocabulary, use_bias=False, rngs=rngs, **types)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in range(self.layers):
            x = getattr(self, f"block_{layer}")(x)
        return self.head(self.norm(x))


def nnx_form(case: Case, weights: Weights) -> Form:
    """Rebuild the decoder in NNX with LoRA layers.

    `nnx.LoRALinear` has no scale, so its b is scale * b.
    """
    if case.scan or case.remat != "none":
        raise UnavailableError("supports unrolled layers without remat only")
    model = nnx.eval_shape(lambda: _Decoder(case.size, case.rank, case.dtype, nnx.Rngs(0)))
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    base = {
        tuple(path.split("/")): leaf for path, leaf in trees.flatten(weights.base["params"]).items()
    }
    factors = {
        (*path.split("/")[1:-1], "lora", f"lora_{name}"): factor
        for path, (a, b) in weights.factors.items()
        for name, factor in (("a", a), ("b", _scaled(b, case.scale)))
    }

    def loss(lora: Any, rest: Any, tokens: Any) -> jax.Array:
        return next_token_loss(nnx.merge(graph, lora, rest)(tokens), tokens)

    def gradients(gradient: Any) -> Factors:
        flat: dict[Any, Any] = {path: leaf[...] for path, leaf in nnx.to_flat_state(gradient)}
        return {
            path: (flat[(*inner, "lora_a")], case.scale * flat[(*inner, "lora_b")])
            for path in weights.factors
            for inner in [(*path.split("/")[1:-1], "lora")]
        }

    return Form(loss, _filled(lora, factors), _filled(rest, base), gradients)


def _scaled(factor: Any, scale: float) -> Any:
    return factor if isinstance(factor, jax.ShapeDtypeStruct) else jnp.float32(scale) * factor


def _filled(state: Any, leaves: dict[Any, Any]) -> Any:
    """Replace the shapes of a state with arrays."""
    return nnx.from_flat_state(
        [(path, variable.replace(leaves[path])) for path, variable in nnx.to_flat_state(state)]
    )
