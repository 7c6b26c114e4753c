"""Write a Hugging Face folder with the adapter merged into the weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import combine
from jax_lora.cli.adapters import LoadedAdapter, add_adapter_options, load_adapter_with_base
from jax_lora.cli.base_model import BaseModel
from jax_lora.cli.export import conversion
from jax_lora.cli.merge_quantized import ORIGINAL, QUANTIZED, merge_quantized
from jax_lora.cli.names import add_name
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError, ModelError
from jax_lora.finetune.settings import DTYPES
from jax_lora.finetune.tasks import longest_input
from jax_lora.merge import merge
from jax_lora.models import load, save
from jax_lora.models.families import family_of
from jax_lora.models.tokenizer_files import copy_companions
from jax_lora.peft.gguf import ARCHITECTURES
from jax_lora.quantize import is_quantized
from jax_lora.storage.atomic_writes import made_folder, replacing
from jax_lora.transform import lora_apply
from jax_lora.transform.low_memory_jit import low_memory_jit

HELP = "merge an adapter into its base model"
EXAMPLE = "jax-lora fuse --adapter-path run --save-path fused --check"


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_adapter_options(parser)
    text = "folder to write [fused_model]"
    add_name(parser, "--save-path", text, default="fused_model", metavar="DIR")
    add = parser.section("merged model").add_argument
    text = "dtype of the weights; auto: that of the training run [auto]"
    add("--dtype", default="auto", choices=DTYPES, help=text)
    text = "of a quantized run: the weights to merge into [original]"
    add("--into", default=ORIGINAL, choices=(ORIGINAL, QUANTIZED), help=text)
    add("--overwrite", action="store_true", help="allow a folder that is not empty")
    text = "load the folder again and print the largest logit difference"
    add("--check", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Write the folder, and return the exit code."""
    target = Path(options.save_path)
    _check_free(target, options.overwrite)
    loaded = load_adapter_with_base(options)
    base, source = loaded.base, loaded.base.folder
    if target.resolve() == source.resolve():
        raise _not_free(target, "the folder of the base model")
    variables = None
    if is_quantized(base.variables):
        loaded, variables = merge_quantized(loaded, options.into)
    expected = adapted_logits(loaded) if options.check else None
    if variables is None:  # only now, because it frees the base model, which is in memory once
        variables = merge(base.variables, loaded.adapter, donate=True)
    params = _rounded(variables.pop("params"), options.dtype)
    if target.exists():
        _write(target, source, base, params)
    else:
        with made_folder(target.parent, ModelError), replacing(target, ModelError) as part:
            _write(part, source, base, params)
    dtype = jax.tree.leaves(params)[0].dtype
    print(f"{target}: {base.name} with {loaded.checkpoint}, {base.size:,} parameters in {dtype}")
    if family_of(base.model).model_type in ARCHITECTURES:
        print(conversion(target, f"{target}.gguf"))
    del params, loaded, base
    if expected is not None:
        difference, largest = logit_difference(expected, target)
        print(f"check: largest logit difference {difference:.3g}, of logits up to {largest:.3g}")
    return 0


def _write(target: Path, source: Path, base: BaseModel, params: Any) -> None:
    save(target, base.model, params)
    copy_companions(source, target, getattr(base.tokenizer, "chosen_template", None))


def _rounded(params: Any, dtype: str) -> Any:
    """Round merged weights to a dtype, leaf by leaf: both copies of the model never exist."""
    if dtype == "auto":
        return params
    leaves, treedef = jax.tree.flatten(params)
    del params
    for index in range(len(leaves)):
        leaves[index] = leaves[index].astype(dtype)
    return jax.tree.unflatten(treedef, leaves)


def adapted_logits(loaded: LoadedAdapter) -> jax.Array:
    """Compute the logits of a base model with its adapter, which is not merged.

    An error of the merge would otherwise go unnoticed.

    Returns:
      (2, tokens, vocabulary) float32, on fixed random tokens.
    """
    model, variables = loaded.base.model, combine(loaded.base.variables, loaded.adapter)
    return _logits(lora_apply(model.apply, form="factored"), model, variables)


def logit_difference(expected: jax.Array, folder: Path) -> tuple[float, float]:
    """Compare the logits of a fused folder, which is loaded again, with `adapted_logits`.

    Returns:
      The largest absolute difference, and the largest absolute logit.
    """
    model, params = load(folder)
    found = _logits(model.apply, model, {"params": params})
    return float(jnp.abs(expected - found).max()), float(jnp.abs(expected).max())


def _logits(apply: Callable[..., jax.Array], model: Any, variables: Any) -> jax.Array:
    tokens = min(64, longest_input(model))
    drawn = np.random.default_rng(0).integers(model.config.vocab_size, size=(2, tokens))
    return low_memory_jit(apply)(variables, jnp.asarray(drawn, jnp.int32)).astype(jnp.float32)


def _check_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise _not_free(target, "a file")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise _not_free(target, "a folder that is not empty")


def _not_free(target: Path, got: str) -> ConfigError:
    fix = "Choose another --save-path, or add --overwrite to replace a fused model."
    expected = "a new or empty folder"
    return ConfigError(f"--save-path {target}", got=got, expected=expected, fix=fix)
