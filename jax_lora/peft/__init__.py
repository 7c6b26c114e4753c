"""Read and write adapters of Hugging Face PEFT, mlx-lm and loralib; write those of llama.cpp.

The argument `names` maps the path of a kernel to the name of its PyTorch module. The models of
`jax_lora.models` provide it as `model.hf_names`; for any other model, write a dict.
"""

from jax_lora.peft.gguf import save_gguf
from jax_lora.peft.load import load
from jax_lora.peft.load_model import load_model
from jax_lora.peft.loralib import load_loralib
from jax_lora.peft.mlx import load_mlx, save_mlx
from jax_lora.peft.save import save

__all__ = ["load", "load_loralib", "load_mlx", "load_model", "save", "save_gguf", "save_mlx"]
