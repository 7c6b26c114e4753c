"""Make tests/fixtures/bert and tests/fixtures/roberta: tiny encoders and PyTorch's logits.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers
    torch-env/bin/python tests/make_fixtures/bert.py

Each folder is what `save_pretrained` writes, and `expected.safetensors` beside the weights holds a
batch with a full, a left-padded and a right-padded row, and the logits with and without types of
tokens.
"""

import shutil
from pathlib import Path

import torch
import transformers
from llama import batch
from safetensors.torch import save_file

HERE = Path(__file__).parent.parent / "fixtures"
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
# Family -> the name of its classes, what all its variants change, and the variants: the class, what
# the variant changes. The first variant of each is written in shards.
FAMILIES = {
    "bert": (
        "Bert",
        {"pad_token_id": 0, "layer_norm_eps": 1e-5},
        {
            "classifier": ("ForSequenceClassification", {"num_labels": 3}),
            "masked_lm": ("ForMaskedLM", {"hidden_act": "relu"}),
        },
    ),
    "roberta": (
        "Roberta",
        {"pad_token_id": 1},
        {
            "classifier": ("ForSequenceClassification", {"num_labels": 3, "type_vocab_size": 1}),
            "masked_lm": ("ForMaskedLM", {"hidden_act": "relu"}),
        },
    ),
}


def run(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The model's main output."""
    with torch.no_grad():
        out = model(**inputs)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name).contiguous()
    raise ValueError(type(out))


# The same for files whose tensors are not just those of our module: folder -> family, class.
OTHERS = {
    "headless/bert": ("bert", "Model"),
    "headless/roberta": ("roberta", "Model"),
    "pretraining/bert": ("bert", "ForPreTraining"),
}


def make(folder: Path, family: str, kind: str, changes: dict, shards: bool) -> None:
    """Write one folder."""
    class_name, common, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{class_name}Config")(**{**SMALL, **common, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, class_name + kind)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros, which hide mistakes
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    ids, mask = batch()
    ids = torch.where(mask.bool(), ids, config.pad_token_id)
    types = torch.zeros_like(ids)
    types[:, 5:] = config.type_vocab_size - 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = {
        **inputs,
        "token_type_ids": types,
        "logits": run(model, **inputs),
        "logits_of_types": run(model, **inputs, token_type_ids=types),
    }
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="6KB" if shards else "1GB")
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    for family, (_, _, variants) in FAMILIES.items():
        for name, (kind, changes) in variants.items():
            make(HERE / family / name, family, kind, changes, name == next(iter(variants)))
    for name, (family, kind) in OTHERS.items():
        make(HERE / name, family, kind, {}, False)
