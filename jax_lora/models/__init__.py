"""Flax Transformers that read and write Hugging Face checkpoints."""

from jax_lora.models.decoder_inputs import KVCache
from jax_lora.models.llama import Llama, LlamaConfig
from jax_lora.models.load_checkpoint import load
from jax_lora.models.save_checkpoint import save
from jax_lora.models.variants import replicate_layers, resize_vocab, untie

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "load",
    "replicate_layers",
    "resize_vocab",
    "save",
    "untie",
]
