"""Make tests/fixtures/gpt2 (and headless/gpt2): tiny random GPT-2s and PyTorch's logits.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers
    torch-env/bin/python tests/make_fixtures/gpt2.py

Each folder is what `save_pretrained` writes, and `expected.safetensors` beside the weights holds a
batch with a full, a left-padded and a right-padded row, and the logits.
"""

import shutil
from pathlib import Path

import torch
from llama import batch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent.parent / "fixtures"
SMALL = {
    "vocab_size": 32,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "n_inner": 24, "activation_function": "relu"},
    "scaled": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "unscaled": {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
}


def make(folder: Path, changes: dict, headless: bool = False) -> None:
    """Write one folder; without its head, a model's tensors have names without a prefix."""
    torch.manual_seed(0)
    config = GPT2Config(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros, which hide mistakes
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    ids, mask = batch()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    shutil.rmtree(folder, ignore_errors=True)
    saved = model.transformer if headless else model
    saved.save_pretrained(folder, max_shard_size="6KB" if folder.name == "tied" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = {"input_ids": ids, "attention_mask": mask, "logits": logits}
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for variant, changes in VARIANTS.items():
        make(HERE / "gpt2" / variant, changes)
    make(HERE / "headless" / "gpt2", {}, headless=True)
