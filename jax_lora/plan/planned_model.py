"""A model as a plan sees it: shapes of its parameters, and what its kernels are. No weights."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from jax_lora.errors import ModelError, format_error
from jax_lora.kernels.kernel import Kernel
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.families import FAMILIES, family_of_config
from jax_lora.models.folder import read_json
from jax_lora.models.parameter_shapes import parameter_shapes
from jax_lora.models.read_config import arguments_to_config, read_config
from jax_lora.plan.arithmetic import KernelShape, ModelShape
from jax_lora.plan.published import GPT3, GPT3_SIZES, NAMES, PUBLISHED
from jax_lora.transform import find_kernels

_TOKENS = 8  # of the row that the kernels are looked for with


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """Shapes, and nothing that would take memory.

    Args:
      name: What it is called.
      module: Its module, or None where there is no code for it (GPT-3).
      variables: `{"params": params}` of `jax.ShapeDtypeStruct`s.
      kernels: What `find_kernels` says of them.
      shape: The same for the formulas.
      longest: Tokens that its positions reach to.
      decodes: Whether `train` could train it.
    """

    name: str
    module: Any
    variables: Any
    kernels: dict[str, Kernel]
    shape: ModelShape
    longest: int
    decodes: bool

    @property
    def dtype(self) -> str:
        """Name the type of the parameters."""
        return str(jax.tree.leaves(self.variables)[0].dtype)


def plan_folder(folder: str | Path, dtype: Any, name: str | None = None) -> PlannedModel:
    """Read the shapes of a Hugging Face folder, of which only config.json is opened.

    Args:
      folder: The folder.
      dtype: Of the parameters; None: as the file says, else float32.
      name: What it is to be called (the folder's path).

    Returns:
      The model.

    Raises:
      ModelError: No such folder, or a model that `load` would refuse.
    """
    config = read_config(Path(folder))
    stored = _stored_dtype(read_json(Path(folder), "config.json"))
    return of_config(config, dtype or stored, name or str(folder))


def plan_shape(name: str, dtype: Any) -> PlannedModel:
    """Find the shapes of a published model, or of a `config.json`.

    Args:
      name: One of `published.NAMES`, a `config.json` under any name, or a folder with one.
      dtype: Of the parameters; None: as the file says, and bfloat16 for a published model.

    Returns:
      The model.

    Raises:
      ModelError: Neither a name that is known nor a file, or one of no model known here.

    Example:
      >>> plan_shape("llama-2-7b", None).shape.size
      6738415616
    """
    if name == GPT3:
        return _gpt3(jnp.dtype(dtype or jnp.bfloat16))
    if name in PUBLISHED:
        raw = PUBLISHED[name]
        config = arguments_to_config(raw, FAMILIES[raw["model_type"]])
        return of_config(config, dtype or jnp.bfloat16, name)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, NAMES, n=3) or NAMES
        _refuse(name, "neither a name that is known nor a file", "See " + ", ".join(near) + ".")
    raw = read_json(path.parent, path.name)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        _refuse(name, f"model_type {raw.get('model_type')!r}", f"There are {known}.")
    # Fields that change the arithmetic and no shape do not matter here.
    return of_config(arguments_to_config(raw, family, path), dtype or _stored_dtype(raw), name)


def _refuse(name: str, got: str, fix: str) -> NoReturn:
    expected = "a published model's name, or a config.json of a model that is known here"
    raise ModelError(format_error(f"--shape {name}", got=got, expected=expected, fix=fix))


def _stored_dtype(raw: Mapping[str, Any]) -> Any:
    named = str(raw.get("torch_dtype") or raw.get("dtype"))
    return jnp.dtype(named if named in ("bfloat16", "float16", "float32") else "float32")


def of_config(config: Any, dtype: Any, name: str, *, remat: bool = False) -> PlannedModel:
    """Trace a model's init and its kernels; nothing is allocated.

    Args:
      config: Its configuration.
      dtype: Of the parameters.
      name: What it is called.
      remat: Whether it recomputes activations.

    Returns:
      The model.
    """
    family = family_of_config(config)
    if family.depth is None:
        _refuse(name, "a model of two stacks", "Plan a decoder or an encoder.")
    module = family.module(config, remat=remat, param_dtype=jnp.dtype(dtype))
    flat = {
        path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in parameter_shapes(module).items()
    }
    variables = {"params": unflatten_dict(flat, sep="/")}
    ids = jax.ShapeDtypeStruct((1, _TOKENS), jnp.int32)
    kernels = find_kernels(module.apply, variables, ids)
    longest = getattr(config, "max_position_embeddings", None) or config.n_positions
    shape = _shape(name, variables, kernels, config)
    return PlannedModel(name, module, variables, kernels, shape, longest, family.decodes)


def with_dtype(model: PlannedModel, dtype: str) -> PlannedModel:
    """The same model with parameters of another type; `"auto"` changes nothing."""
    if dtype in ("auto", model.dtype):
        return model
    if model.module is None:
        return _gpt3(jnp.dtype(dtype))
    return of_config(model.module.config, dtype, model.name)


# -----------------------------------------------------------------------------------------------
# From what JAX sees to what the formulas take
# -----------------------------------------------------------------------------------------------


def _first(config: Any, *names: str) -> int:
    """The first of several fields that a configuration has and has set."""
    return next(int(value) for name in names if (value := getattr(config, name, None)))


def _shape(name: str, variables: Any, kernels: Mapping[str, Kernel], config: Any) -> ModelShape:
    found = tuple(_kernel(kernel) for kernel in kernels.values())
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    width = _first(config, "hidden_size", "n_embd", "d_model")
    inner = _first(config, "moe_intermediate_size", "intermediate_size", "n_inner", "d_ff")
    return ModelShape(
        name=name,
        kernels=found,
        other=total - sum(kernel.size for kernel in found),
        width=width,
        layers=_first(config, "num_hidden_layers", "n_layer", "num_layers")
        + (getattr(config, "num_decoder_layers", None) or 0),
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or getattr(config, "d_kv", width // heads),
        feed_forward=inner * (getattr(config, "num_experts_per_tok", None) or 1),
        vocabulary=config.vocab_size,
        wide_norms=4 if isinstance(config, DecoderConfig) else 6,
    )


def _kernel(kernel: Kernel) -> KernelShape:
    return KernelShape(
        path=kernel.path.removeprefix("params/"),
        inputs=kernel.in_size,
        outputs=kernel.out_size,
        count=math.prod(kernel.stack_shape),
        # Two operations for each weight that a token meets.
        active=kernel.flops // (2 * _TOKENS),
        kind=kernel.kind,
        is_head=kernel.is_output_head,
    )


def _gpt3(dtype: Any) -> PlannedModel:
    """GPT-3 175B, with queries, keys and values by kernels of their own as in the LoRA paper."""
    width, layers = GPT3_SIZES["width"], GPT3_SIZES["layers"]
    dense = {f"attn/{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    dense |= {"mlp/fc1": (width, 4 * width), "mlp/fc2": (4 * width, width)}
    flat: dict[str, Any] = {
        "wte/embedding": (GPT3_SIZES["vocabulary"], width),
        "wpe/embedding": (GPT3_SIZES["positions"], width),
        "ln_f/scale": (width,),
        "ln_f/bias": (width,),
    }
    for path, (inputs, outputs) in dense.items():
        flat[f"layers/{path}/kernel"] = (layers, inputs, outputs)
        flat[f"layers/{path}/bias"] = (layers, outputs)
    for norm in ("ln_1", "ln_2"):
        flat |= {f"layers/{norm}/{leaf}": (layers, width) for leaf in ("scale", "bias")}
    flat = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in flat.items()}
    kernels = {
        f"params/{path}": _gpt3_kernel(f"params/{path}", leaf)
        for path, leaf in flat.items()
        if path.endswith(("kernel", "embedding"))
    }
    variables = {"params": unflatten_dict(flat, sep="/")}
    found = tuple(_kernel(kernel) for kernel in kernels.values())
    total = sum(math.prod(leaf.shape) for leaf in flat.values())
    shape = ModelShape(
        name=GPT3, kernels=found, other=total - sum(k.size for k in found), width=width,
        layers=layers, heads=GPT3_SIZES["heads"], groups=GPT3_SIZES["heads"],
        head_dim=width // GPT3_SIZES["heads"], feed_forward=4 * width,
        vocabulary=GPT3_SIZES["vocabulary"], wide_norms=6,
    )  # fmt: skip
    return PlannedModel(GPT3, None, variables, kernels, shape, GPT3_SIZES["positions"], False)


def _gpt3_kernel(path: str, leaf: Any) -> Kernel:
    if path.endswith("embedding"):
        return Kernel(path, leaf.shape, leaf.dtype, "embedding", (0,), (1,))
    flops = 2 * _TOKENS * math.prod(leaf.shape)
    return Kernel(path, leaf.shape, leaf.dtype, "dense", (1,), (2,), (0,), 1, flops)
