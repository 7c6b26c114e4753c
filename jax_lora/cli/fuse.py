"""Write a Hugging Face folder with the adapter merged into the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import combine
from jax_lora.cli.adapters import LoadedAdapter, add_adapter_options, load_adapter_with_base
from jax_lora.cli.base_model import BaseModel
from jax_lora.cli.merge_quantized import ORIGINAL, QUANTIZED, merge_quantized
from jax_lora.errors import ConfigError, ModelError, format_error
from jax_lora.finetune.settings import DTYPES
from jax_lora.finetune.tasks import longest_input
from jax_lora.merge import merge
from jax_lora.models import load, save
from jax_lora.models.tokenizer_files import copy_companions
from jax_lora.quantize import is_quantized
from jax_lora.storage.atomic_writes import made_folder, replacing
from jax_lora.transform import lora_apply

HELP = "merge an adapter into its base model"
EXAMPLE = "jax-lora fuse --adapter-path run --save-path fused --check"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    add = parser.add_argument
    add_adapter_options(parser)
    add("--save-path", default="fused_model", metavar="DIR", help="folder to write [fused_model]")
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
    if is_quantized(base.variables):
        loaded, variables = merge_quantized(loaded, options.into)
    else:
        variables = merge(base.variables, loaded.adapter, donate=not options.check)
    params = variables["params"]
    if options.dtype != "auto":
        # Rounded once, after the update is added.
        params = jax.tree.map(lambda leaf: leaf.astype(options.dtype), params)
    if target.exists():
        _write(target, source, base, params)
    else:
        with made_folder(target.parent, ModelError), replacing(target, ModelError) as part:
            _write(part, source, base, params)
    dtype = jax.tree.leaves(params)[0].dtype
    print(f"{target}: {base.name} with {loaded.checkpoint}, {base.size:,} parameters in {dtype}")
    if options.check:
        difference, largest = logit_difference(loaded, target)
        print(f"check: largest logit difference {difference:.3g}, of logits up to {largest:.3g}")
    return 0


def _write(target: Path, source: Path, base: BaseModel, params: Any) -> None:
    save(target, base.model, params)
    copy_companions(source, target, getattr(base.tokenizer, "chosen_template", None))


def logit_difference(loaded: LoadedAdapter, folder: Path) -> tuple[float, float]:
    """Compare the logits of a fused folder with those of the base model and the adapter.

    Args:
      loaded: The base model and the adapter.
      folder: The fused folder; it is loaded again.

    Returns:
      The largest absolute difference on fixed random tokens, and the largest absolute logit.
    """
    config = loaded.base.model.config
    tokens = min(64, longest_input(loaded.base.model))
    drawn = np.random.default_rng(0).integers(config.vocab_size, size=(2, tokens))
    ids = jnp.asarray(drawn, jnp.int32)
    # The adapter is not merged here: an error of the merge would otherwise go unnoticed.
    unmerged = jax.jit(lora_apply(loaded.base.model.apply, form="factored"))
    ours = unmerged(combine(loaded.base.variables, loaded.adapter), ids).astype(jnp.float32)
    model, params = load(folder)
    theirs = jax.jit(model.apply)({"params": params}, ids).astype(jnp.float32)
    return float(jnp.abs(ours - theirs).max()), float(jnp.abs(ours).max())


def _check_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise _not_free(target, "a file")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise _not_free(target, "a folder that is not empty")


def _not_free(target: Path, got: str) -> ConfigError:
    fix = "Choose another --save-path, or add --overwrite to replace a fused model."
    expected = "a new or empty folder"
    return ConfigError(format_error(f"--save-path {target}", got=got, expected=expected, fix=fix))
