"""Make tests/fixtures/peft: adapters that PEFT writes, and the logits PyTorch gives with them.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers peft
    torch-env/bin/python tests/make_fixtures/adapters.py               # all of them
    torch-env/bin/python tests/make_fixtures/adapters.py dora biases   # some

Each folder is what `save_pretrained` writes for one of the small models beside it, with factors
that are not zero; `expected.safetensors` holds a batch, the logits, and for one of them a few steps
of training. `base.json` says which model it is for, and how that is changed first.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parent.parent / "fixtures"
HERE = FIXTURES / "peft"
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# Name -> base model, settings.
CASES = {
    "plain": ("llama/untied", PLAIN),
    "all_linear_rslora": ("llama/llama3", {**ALL, "use_rslora": True, "lora_dropout": 0.1}),
    "patterns": (
        "llama/untied",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 16},
        },
    ),
    "layers": ("llama/untied", {**PLAIN, "layers_to_transform": [1]}),
    "embedding": ("llama/untied", {**PLAIN, "target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama/untied", {**PLAIN, "target_modules": ["lm_head", "q_proj"]}),
    "tied_embedding": ("llama/tied", {**PLAIN, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied_both": (
        "llama/tied",
        {**PLAIN, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "dora": ("llama/untied", {**ALL, "use_dora": True}),
    "dora_embedding": (
        "llama/untied",
        {**PLAIN, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "lora_bias": ("llama/biased", {**PLAIN, "lora_bias": True}),
    "bias_all": ("llama/biased", {**PLAIN, "bias": "all"}),
    "bias_lora_only": ("llama/biased", {**PLAIN, "bias": "lora_only"}),
    "whole": ("llama/untied", {**PLAIN, "modules_to_save": ["lm_head", "norm"]}),
    "tokens": ("llama/untied", {**PLAIN, "trainable_token_indices": [3, 7, 1]}),
    "tokens_tied": ("llama/tied", {**PLAIN, "trainable_token_indices": [3, 7, 1]}),
    "resized": ("llama/untied", {**PLAIN, "resize": 35}),
    "resized_tied": ("llama/tied", {**PLAIN, "resize": 35}),
    "tied_whole": (
        "llama/tied",
        {**PLAIN, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    # These two change each end of a tied table in its own way.
    "tied_whole_lookup": ("llama/tied", {**PLAIN, "modules_to_save": ["embed_tokens"]}),
    "tied_whole_ends": ("llama/tied", {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied_resized_replication": (
        "llama/tied",
        {
            **PLAIN,
            "target_modules": ["embed_tokens", "q_proj"],
            "resize": 35,
            "layer_replication": [[0, 2], [1, 2]],
        },
    ),
    "replication": ("llama/untied", {**PLAIN, "layer_replication": [[0, 2], [1, 2]]}),
    "bfloat16": ("llama/untied", {**PLAIN, "file_dtype": torch.bfloat16}),
    "float16": ("llama/untied", {**PLAIN, "file_dtype": torch.float16}),
    "fused": ("phi3/window", ALL),
    "conv1d": (
        "gpt2/tied",
        {**PLAIN, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "experts": (
        "qwen3_moe/untied",
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "router": (
        "mixtral/untied",
        {
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"],
            "rank_pattern": {"mlp.experts.down_proj": 3},
        },
    ),
}


def batch(vocabulary: int) -> torch.Tensor:
    """Two rows of eight tokens."""
    return torch.randint(2, vocabulary, (2, 8), generator=torch.Generator().manual_seed(1))


def make(name: str, folder: Path) -> None:
    """Write one folder."""
    base, settings = CASES[name][0], dict(CASES[name][1])
    dtype, resize = settings.pop("file_dtype", None), settings.pop("resize", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / base, attn_implementation="eager")
    model.name_or_path = model.config._name_or_path = "base"  # no path of the machine that made it
    if resize:
        model.resize_token_embeddings(resize)
    if "target_parameters" not in settings:
        settings["task_type"] = "CAUSAL_LM"
    peft_model = get_peft_model(model, LoraConfig(**settings, base_model_name_or_path="base"))
    with torch.no_grad():
        for key, parameter in peft_model.named_parameters():
            if parameter.requires_grad:  # magnitudes stay near the norms that they start from
                near = "magnitude" in key or "lora" not in key
                noise = torch.randn(parameter.shape) * (0.1 if near else 0.3)
                parameter.copy_(parameter * (1 + noise) + noise if near else noise)
    ids = batch(resize or model.config.vocab_size)
    peft_model.eval()
    if dtype:
        for key, parameter in peft_model.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.to(dtype)
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT sees a changed vocabulary only beside the base's own files.
        tables = True if resize else "auto"
        peft_model.save_pretrained(folder, save_embedding_layers=tables)
    (folder / "README.md").unlink(missing_ok=True)
    if dtype:
        for parameter in peft_model.parameters():
            parameter.data = parameter.data.float()
    with torch.no_grad():
        logits = peft_model(input_ids=ids).logits
    expected = {"input_ids": ids, "logits": logits}
    if name == "plain":
        expected |= training(peft_model, ids)
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    facts = {"model": base, "resize": resize, "replicate": settings.get("layer_replication")}
    (folder / "base.json").write_text(json.dumps(facts, indent=1) + "\n")


def training(model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and its gradients, and the factors after five steps of AdamW."""
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
    found, losses = {}, []
    for step in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            found |= {f"gradient {key}": p.grad.clone() for key, p in trained.items()}
        optimizer.step()
    found |= {f"trained {key}": p.detach() for key, p in trained.items()}
    return {**found, "losses": torch.stack(losses)}


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case, HERE / case)
