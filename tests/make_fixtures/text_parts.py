"""Make tests/fixtures/gemma3 and mistral3: tiny models with a vision tower, and logits for text.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers peft
    torch-env/bin/python tests/make_fixtures/text_parts.py

Each folder has what those of `decoders.py` have. The tensors are named as in published files, whose
text model is at `language_model.model`, or as transformers 5 names them, `model.language_model`.
"""

import re
import shutil
from pathlib import Path

import torch
import transformers
from decoders import HERE, MINISTRAL, batch, more
from llama import SMALL
from safetensors.torch import load_file, save_file

VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = {
    **SMALL,
    "model_type": "gemma3_text",
    "sliding_window": 4,
    "query_pre_attn_scalar": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
MISTRAL = {
    **SMALL,
    "model_type": "mistral",
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# Folder -> class, `text_config`, other fields, and whether names are as in published files.
FOLDERS = {
    "gemma3/published": ("Gemma3", GEMMA, {"mm_tokens_per_image": 4}, True),
    "gemma3/current": ("Gemma3", GEMMA, {"mm_tokens_per_image": 4}, False),
    "mistral3/published": ("Mistral3", MISTRAL, {"tie_word_embeddings": False}, True),
    "mistral3/ministral": (
        "Mistral3",
        {**SMALL, "model_type": "ministral3", "rope_parameters": MINISTRAL},
        {"tie_word_embeddings": True},
        False,
    ),
}
PUBLISHED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.(vision_tower|multi_modal_projector)", r"\1"),
)
CURRENT = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
)


def make(name: str) -> None:
    """Write one folder."""
    class_name, text, more_fields, is_published = FOLDERS[name]
    folder: Path = HERE / name
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    kind = "siglip_vision_model" if class_name == "Gemma3" else "pixtral"
    config = getattr(transformers, f"{class_name}Config")(
        text_config={**text, **special},
        vision_config={**VISION, "model_type": kind},
        image_token_index=31,
        **more_fields,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{class_name}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    ids, mask = batch()
    ids[ids == 31] = 30  # no images
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for pattern, replacement in PUBLISHED if is_published else CURRENT:
        tensors = {re.sub(pattern, replacement, key): each for key, each in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    expected = {"input_ids": ids, "attention_mask": mask, "logits": logits}
    expected |= more(model, ids, folder, r".*language_model.*_proj")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for each in FOLDERS:
        make(each)
