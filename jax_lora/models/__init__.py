"""Flax Transformers that read and write Hugging Face checkpoints."""

from jax_lora.models import architectures
from jax_lora.models.architectures import *  # noqa: F403  the names stand in their `__all__`
from jax_lora.models.bert import Bert, BertConfig, Roberta, RobertaConfig
from jax_lora.models.classifier import add_classifier
from jax_lora.models.decoder_inputs import KVCache
from jax_lora.models.decoding import generate
from jax_lora.models.gpt2 import GPT2, GPT2Config
from jax_lora.models.load_checkpoint import load
from jax_lora.models.mesh_sharding import mesh_sharding
from jax_lora.models.rematerialization import remat_policy
from jax_lora.models.save_checkpoint import save
from jax_lora.models.surgery import replicate_layers, resize_vocab, untie
from jax_lora.models.t5 import T5, T5Cache, T5Config

__all__ = [
    "GPT2",
    "T5",
    "Bert",
    "BertConfig",
    "GPT2Config",
    "KVCache",
    "Roberta",
    "RobertaConfig",
    "T5Cache",
    "T5Config",
    "add_classifier",
    "generate",
    "load",
    "mesh_sharding",
    "remat_policy",
    "replicate_layers",
    "resize_vocab",
    "save",
    "untie",
]
__all__ += architectures.__all__
