"""Make tests/fixtures/<family>: tiny random decoders and the logits PyTorch gives for them.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers peft
    torch-env/bin/python tests/make_fixtures/decoders.py            # all of them
    torch-env/bin/python tests/make_fixtures/decoders.py gemma2     # one family

Each folder is what `save_pretrained` writes, and `expected.safetensors` beside the weights holds a
batch with a full, a left-padded and a right-padded row, and the logits. Windows are shorter than
the rows, and trained lengths too where a scaling goes by them, so that both are seen to matter.

The first variant of the families in `THOROUGH` has more: the logits of a row of packed documents,
the greedy continuation of prompts, and an adapter of PEFT with its logits.
"""

import shutil
import sys
from pathlib import Path

import torch
import transformers
from llama import ORIGINAL, SMALL, batch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).parent.parent / "fixtures"
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, **ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 100.0,
    **ORIGINAL,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 5.0, 9.0],
}
# Rows of 12 tokens are longer than the trained length, where scores begin to grow.
MINISTRAL = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}  # Qwen's two fields
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 12}
# Phi-3 has no head_dim of its own: hidden_size / heads.
PHI = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}
PHI_LONG = {**PHI, "rope_parameters": LONG}

# Family -> the name of its classes, what all its variants change, and the variants. The first
# variant of each is written in shards.
FAMILIES = {
    "mistral": (
        "Mistral",
        {},
        {
            "window": {"sliding_window": 4},
            "full": {"sliding_window": None, **TIED},
            "llama3": {"sliding_window": 5, "rope_parameters": LLAMA3},
        },
    ),
    "qwen2": (
        "Qwen2",
        {"head_dim": None},
        {
            "untied": {},
            "tied": {**TIED, "rope_parameters": YARN},
            "mixed": {**WINDOW, "max_window_layers": 1, "num_hidden_layers": 3},
            "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 8},
        },
    ),
    "qwen3": (
        "Qwen3",
        {},
        {
            "untied": {},
            "tied": {**TIED, "attention_bias": True, "rope_parameters": YARN},
            "mixed": {
                **WINDOW,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "num_hidden_layers": 3,
            },
        },
    ),
    "gemma": (
        "Gemma",
        {},
        {"tied": {"num_key_value_heads": 1}, "untied": {**UNTIED, "attention_bias": True}},
    ),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 4, "query_pre_attn_scalar": 5, "num_hidden_layers": 3},
        {
            # Low caps, so that tiny scores and logits feel them.
            "capped": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
            "plain": {
                **UNTIED,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            },
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {"sliding_window": 4, "query_pre_attn_scalar": 5, "num_hidden_layers": 3},
        {
            "mixed": {
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                },
            },
            "untied": {**UNTIED, "final_logit_softcapping": 3.0, "attention_bias": True},
        },
    ),
    "phi3": (
        "Phi3",
        PHI,
        {
            "window": {"sliding_window": 4},
            "tied": {**TIED, "num_key_value_heads": 2},
            "short": {**PHI_LONG, "original_max_position_embeddings": 16},
            "long": {**PHI_LONG, "original_max_position_embeddings": 8},
            "partial": {
                "original_max_position_embeddings": 8,
                "rope_parameters": {
                    **LONG,
                    "partial_rotary_factor": 0.75,
                    "short_factor": [1.0, 1.25, 1.5],
                    "long_factor": [1.0, 3.0, 9.0],
                },
            },
        },
    ),
    "mixtral": (
        "Mixtral",
        {**EXPERTS, "num_local_experts": 4},
        {"untied": {}, "tied": {**TIED, "sliding_window": 4, "rope_parameters": LINEAR}},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "moe_intermediate_size": 12, "num_experts": 4},
        {
            "untied": {"norm_topk_prob": True},
            "tied": {**TIED, **WINDOW, "norm_topk_prob": False, "attention_bias": True},
        },
    ),
    "smollm3": (
        "SmolLM3",
        {"num_hidden_layers": 3},
        {
            "window": {**UNTIED, **WINDOW, "no_rope_layers": [1, 0, 1]},
            "full": {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True},
        },
    ),
    "olmo2": ("Olmo2", {"head_dim": None}, {"untied": {}}),
    "granite": (
        "Granite",
        {"head_dim": None},
        {
            "tied": {
                **TIED,
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.2,
                "residual_multiplier": 0.4,
                "logits_scaling": 2.0,
            },
        },
    ),
    "seed_oss": (
        "SeedOss",
        {},
        {
            "published": {},
            "output": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
        },
    ),
    "ministral3": ("Ministral3", {"rope_parameters": MINISTRAL}, {"untied": {}}),
}
THOROUGH = ("smollm3", "olmo2", "granite", "seed_oss", "ministral3")
NEW = 8  # tokens of a continuation


def make(family: str, name: str, folder: Path) -> None:
    """Write one folder."""
    class_name, common, variants = FAMILIES[family]
    config_class = "Gemma3TextConfig" if class_name == "Gemma3" else f"{class_name}Config"
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    if class_name == "Gemma3":
        settings = {}
    settings = {**SMALL, **settings, **common, **variants[name]}
    if settings["head_dim"] is None:
        del settings["head_dim"]
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings, **special)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{class_name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros, which hide mistakes
            torch.nn.init.normal_(parameter, 0.7, 0.3)
        if parameter.ndim == 3:  # stacked experts
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    ids, mask = batch()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    shutil.rmtree(folder, ignore_errors=True)
    first = name == next(iter(variants))
    model.save_pretrained(folder, max_shard_size="6KB" if first else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = {"input_ids": ids, "attention_mask": mask, "logits": logits}
    if first and family in THOROUGH:
        expected |= more(model, ids, folder)
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def more(
    model, ids: torch.Tensor, folder: Path, targets: str = "all-linear"
) -> dict[str, torch.Tensor]:
    """Score packed documents, continue prompts, and write an adapter."""
    lengths = [5, 4, 3]
    documents = torch.split(ids[:1], lengths, dim=1)
    prompts = ids[:, :6].clone()
    mask = torch.ones_like(prompts)
    prompts[1, :3], mask[1, :3] = 1, 0
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 1, "eos_token_id": []}
    with torch.no_grad():
        packed = torch.cat([model(input_ids=each).logits for each in documents], dim=1)
        made = {
            "packed_logits": packed,
            "segment_ids": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
            "prompts": prompts,
            "prompts_mask": mask,
            "continued": model.generate(prompts, attention_mask=mask, **settings),
        }
    model.name_or_path = model.config._name_or_path = "base"  # no path of the machine
    settings = {"r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**settings, base_model_name_or_path="base"))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        made["adapted_logits"] = adapted.eval()(input_ids=ids[:1]).logits
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    return made


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        for name in FAMILIES[family][2]:
            make(family, name, HERE / family / name)
