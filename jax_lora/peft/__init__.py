"""Adapters in the files of others: Hugging Face PEFT, mlx-lm and loralib.

`names` says what each of our kernels is called there; `jax_lora.models` gives it for its own models
as `model.hf_names`, and anybody can write it down for a model of their own.
"""

from jax_lora.peft.load import load
from jax_lora.peft.load_model import load_model
from jax_lora.peft.loralib import load_loralib
from jax_lora.peft.mlx import load_mlx, save_mlx
from jax_lora.peft.save import save

__all__ = ["load", "load_loralib", "load_mlx", "load_model", "save", "save_mlx"]
