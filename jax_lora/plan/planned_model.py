"""The shapes of a model and its kernels, without any weights."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from jax_lora.errors import ModelError
from jax_lora.kernels.kernel import Kernel
from jax_lora.kernels.targets import find_routers
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.families import FAMILIES, family_of_config
from jax_lora.models.folder import read_json
from jax_lora.models.model_kernels import TOKENS, model_kernels
from jax_lora.models.parameter_shapes import parameter_shapes
from jax_lora.models.read_config import arguments_to_config, read_config
from jax_lora.plan.arithmetic import KernelShape, ModelShape
from jax_lora.plan.published import GPT3, GPT3_CONFIG, NAMES, PUBLISHED
from jax_lora.storage.safe_paths import given_path


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """A model without weights."""

    name: str  # for display
    module: Any  # the Flax module; None for GPT-3, which this package does not implement
    variables: Any  # `{"params": params}` of `jax.ShapeDtypeStruct`s
    kernels: Mapping[str, Kernel]  # from `find_kernels`
    shape: ModelShape
    max_length: int  # longest sequence that the model supports
    decodes: bool  # only the training steps of decoders are compiled

    @property
    def dtype(self) -> str:
        """Name of the parameters' dtype."""
        return str(jax.tree.leaves(self.variables)[0].dtype)


def plan_folder(folder: str | Path, dtype: Any, name: str | None = None) -> PlannedModel:
    """Read the shapes of a Hugging Face folder from its `config.json`.

    Without `dtype`, the parameters have the one in the file, or float32.

    Raises:
      ModelError: The folder does not exist, or the model is not supported.
    """
    config = read_config(given_path(folder, ModelError))
    stored = _stored_dtype(json.loads(config.source))
    return plan_config(config, dtype or stored, name or str(folder))


def plan_shape(name: str, dtype: Any) -> PlannedModel:
    """Look up the shapes of a published model, or read them from a `config.json`.

    `name` is one of `published.NAMES`, the path of a configuration file, or a folder with a
    `config.json`. Without `dtype`, the parameters have the one in the file; those of a published
    model are in bfloat16.

    Raises:
      ModelError: The name is unknown and not a file, or the architecture is not supported.

    Example:
      >>> plan_shape("llama-2-7b", None).shape.size
      6738415616
    """
    if name == GPT3:
        return _gpt3(jnp.dtype(dtype or jnp.bfloat16))
    if name in PUBLISHED:
        raw = PUBLISHED[name]
        config = arguments_to_config(raw, FAMILIES[raw["model_type"]])
        return plan_config(config, dtype or jnp.bfloat16, name)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, NAMES, n=3) or NAMES
        _refuse(name, "neither a known name nor a file", "Choose " + ", ".join(near) + ".")
    raw = read_json(path.parent, path.name)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        _refuse(name, f"model_type {raw.get('model_type')!r}", f"Supported are {supported}.")
    # Unlike `read_config`, this accepts fields that change the computation but no shape.
    return plan_config(arguments_to_config(raw, family, path), dtype or _stored_dtype(raw), name)


def plan_config(config: Any, dtype: Any, name: str) -> PlannedModel:
    """Trace the initialization and the kernels of a decoder or encoder, without any array."""
    family = family_of_config(config)
    if family.depth is None:
        _refuse(name, "an encoder-decoder", "Plan a decoder or an encoder.")
    module = family.module(config, param_dtype=jnp.dtype(dtype))
    variables = _abstract(parameter_shapes(module), dtype)
    kernels = model_kernels(module.apply, variables)
    max_length = getattr(config, "max_position_embeddings", None) or config.n_positions
    shape = _shape(name, variables, kernels, config)
    return PlannedModel(name, module, variables, kernels, shape, max_length, family.decodes)


def with_dtype(model: PlannedModel, dtype: str) -> PlannedModel:
    """Return the model with another parameter dtype; `"auto"` keeps the present one."""
    if dtype in ("auto", model.dtype):
        return model
    if model.module is None:
        return _gpt3(jnp.dtype(dtype))
    return plan_config(model.module.config, dtype, model.name)


def _refuse(name: str, got: str, fix: str) -> NoReturn:
    expected = "the name of a published model, or a config.json of a supported architecture"
    raise ModelError(f"--shape {name}", got=got, expected=expected, fix=fix)


def _stored_dtype(raw: Mapping[str, Any]) -> Any:
    named = str(raw.get("torch_dtype") or raw.get("dtype"))
    return jnp.dtype(named if named in ("bfloat16", "float16", "float32") else "float32")


def _abstract(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> Any:
    flat = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
    return {"params": unflatten_dict(flat, sep="/")}


# --- The sizes that the formulas use -----------------------------------------------------------


def _first(config: Any, *names: str) -> int:
    """Return the first of several fields that the configuration has and sets."""
    return next(int(value) for name in names if (value := getattr(config, name, None)))


def _shape(name: str, variables: Any, kernels: Mapping[str, Kernel], config: Any) -> ModelShape:
    routers = find_routers(kernels)
    found = tuple(
        KernelShape(
            path=kernel.path.removeprefix("params/"),
            inputs=kernel.in_size,
            outputs=kernel.out_size,
            count=math.prod(kernel.stack_shape),
            # A token needs two operations for each element that it uses.
            active=kernel.flops // (2 * TOKENS),
            kind=kernel.kind,
            is_head=kernel.is_output_head,
            is_router=kernel.path in routers,
        )
        for kernel in kernels.values()
    )
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    heads = _first(config, "num_attention_heads", "n_head")
    hidden = _first(config, "hidden_size", "n_embd")
    inner = _first(config, "moe_intermediate_size", "intermediate_size", "n_inner")
    return ModelShape(
        name=name,
        kernels=found,
        other=total - sum(kernel.size for kernel in found),
        hidden_size=hidden,
        num_layers=_first(config, "num_hidden_layers", "n_layer"),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate_size=inner * (getattr(config, "num_experts_per_tok", None) or 1),
        vocab_size=config.vocab_size,
        float32_norms=4 if isinstance(config, DecoderConfig) else 6,
    )


def _gpt3(dtype: Any) -> PlannedModel:
    """Return GPT-3 175B with separate query, key and value kernels, as the LoRA paper adapts it."""
    config = SimpleNamespace(**GPT3_CONFIG)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    positions = config.max_position_embeddings
    dense = {f"attn/{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    dense |= {"mlp/fc1": (width, inner), "mlp/fc2": (inner, width)}
    shapes: dict[str, tuple[int, ...]] = {
        "wte/embedding": (config.vocab_size, width),
        "wpe/embedding": (positions, width),
        "ln_f/scale": (width,),
        "ln_f/bias": (width,),
    }
    for path, (inputs, outputs) in dense.items():
        shapes[f"layers/{path}/kernel"] = (layers, inputs, outputs)
        shapes[f"layers/{path}/bias"] = (layers, outputs)
    for norm in ("ln_1", "ln_2"):
        shapes |= {f"layers/{norm}/{leaf}": (layers, width) for leaf in ("scale", "bias")}
    kernels: dict[str, Kernel] = {}
    for path, shape in shapes.items():
        full = f"params/{path}"
        if path.endswith("embedding"):
            kernels[full] = Kernel(full, shape, dtype, "embedding", (0,), (1,))
        elif path.endswith("kernel"):
            flops = 2 * TOKENS * math.prod(shape)
            kernels[full] = Kernel(full, shape, dtype, "dense", (1,), (2,), (0,), 1, flops)
    variables = _abstract(shapes, dtype)
    shape = _shape(GPT3, variables, kernels, config)
    return PlannedModel(GPT3, None, variables, kernels, shape, positions, False)
