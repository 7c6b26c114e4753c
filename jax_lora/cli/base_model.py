"""Loads the base model that a verb works on, with its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora import bundled
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ModelError, StructureError, format_error
from jax_lora.finetune.compile_cache import use_compile_cache
from jax_lora.models import load
from jax_lora.models.families import family_of_config
from jax_lora.models.read_config import read_config

BUNDLED = "bundled"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A frozen model and what belongs to it.

    Args:
      name: `"bundled"` or its folder.
      model: The module.
      variables: `{"params": params}`.
      tokenizer: Its tokenizer.
    """

    name: str
    model: Any
    variables: Any
    tokenizer: Tokenizer

    @property
    def dtype(self) -> str:
        """Name the type of the parameters."""
        return str(jax.tree.leaves(self.variables)[0].dtype)

    @property
    def size(self) -> int:
        """Count the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables))


def model_folder(name: str | None) -> Path:
    """Find the folder of a model; none, or `"bundled"`, means the one in the package."""
    return bundled.model_path() if name in (None, BUNDLED) else Path(str(name))


def data_folder(name: str | None) -> Path:
    """Find the data; none, or `"bundled"`, means those in the package."""
    return bundled.data_path() if name in (None, BUNDLED) else Path(str(name))


def load_base(name: str | None, dtype: str = "auto", *, remat: bool = False) -> BaseModel:
    """Load a model and its tokenizer.

    Args:
      name: A Hugging Face folder, or None for the model in the package.
      dtype: `"float32"`, `"bfloat16"`, or `"auto"`: float32 on a CPU, which is slow at anything
        else, and the files' own type on other devices.
      remat: Recompute activations in the backward pass, to save memory.

    Returns:
      The model.

    Raises:
      ModelError: The folder cannot be read, or holds no decoder.
      StructureError: The tokenizer has tokens that the model has no embedding for.
    """
    use_compile_cache()
    folder = model_folder(name)
    if dtype == "auto":
        chosen = jnp.float32 if jax.default_backend() == "cpu" else None
    else:
        chosen = jnp.dtype(dtype)
    _check_decodes(folder)
    tokenizer = Tokenizer.load(folder)
    model, params = load(folder, dtype=chosen, remat=remat)
    if tokenizer.size > model.config.vocab_size:
        raise StructureError(
            format_error(
                str(folder),
                got=f"a tokenizer of {tokenizer.size} tokens",
                expected=f"at most the model's vocabulary of {model.config.vocab_size}",
                fix="Copy the tokenizer from the model's own folder.",
            )
        )
    shown = BUNDLED if name in (None, BUNDLED) else str(folder)
    return BaseModel(shown, model, {"params": params}, tokenizer)


def _check_decodes(folder: Path) -> None:
    """Refuse encoders, before their tokenizers are asked for what only decoders need."""
    family = family_of_config(read_config(folder))
    if not family.decodes:
        raise ModelError(
            format_error(
                str(folder),
                got=f"a {family.module.__name__}",
                expected="a decoder, which goes on from a prompt",
                fix="fine-tune other models through the library; see examples/classify_reviews.py.",
            )
        )
