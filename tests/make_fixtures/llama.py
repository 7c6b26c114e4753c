"""Make tests/fixtures/llama: tiny random Llamas and the logits PyTorch gives for them.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers
    torch-env/bin/python tests/make_fixtures/llama.py

Each folder is what `save_pretrained` writes, and `expected.safetensors` beside the weights holds a
batch with a full, a left-padded and a right-padded row, and the logits.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent.parent / "fixtures" / "llama"
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
ORIGINAL = {"original_max_position_embeddings": 8}
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5}},
    # Rows of 12 tokens pass the trained length of 8, which is what makes this one dynamic.
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 100.0, **ORIGINAL}
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 100.0,
            **ORIGINAL,
        }
    },
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 12 tokens: full, four padded on the left, five padded on the right."""
    ids = torch.randint(2, 32, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, 7:] = 0
    return ids * mask, mask


def make(name: str, changes: dict) -> None:
    """Write one folder."""
    settings = {**SMALL, **changes}
    settings["rope_parameters"] = {
        "rope_theta": 10000.0,
        **settings.get("rope_parameters", {"rope_type": "default"}),
    }
    torch.manual_seed(0)
    config = LlamaConfig(**settings, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros, which hide mistakes
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    ids, mask = batch()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="6KB" if name == "untied" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = {"input_ids": ids, "attention_mask": mask, "logits": logits}
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for variant, changes in VARIANTS.items():
        make(variant, changes)
