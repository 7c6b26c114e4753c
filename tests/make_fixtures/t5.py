"""Make tests/fixtures/t5: tiny random T5s and the logits PyTorch gives for them.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers
    torch-env/bin/python tests/make_fixtures/t5.py

Each folder is what `save_pretrained` writes, and `expected.safetensors` beside the weights holds a
batch whose texts are a full, a left-padded and a right-padded row, answers padded on the right, the
logits, and what greedy generation answers. `buckets.safetensors` holds the buckets of distances.
"""

import shutil
from pathlib import Path

import torch
from llama import batch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

HERE = Path(__file__).parent.parent / "fixtures" / "t5"
SMALL = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    # Distances of 12 tokens pass the last bucket.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = {
    "relu": {},
    "gated": {**V11, "num_decoder_layers": 3},
    "gated_tied": {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-5},
    "unscaled": {"tie_word_embeddings": False},  # the embedding is the head, and is not scaled
}
# (buckets, largest distance): the usual ones, the fixtures', and odd ones.
BUCKETS = [(32, 128), (8, 9), (32, 64), (20, 77), (64, 512)]


def answers(model: T5ForConditionalGeneration, ids: torch.Tensor, mask: torch.Tensor):
    """The start token and the ten likeliest tokens, one at a time, without a cache."""
    out = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    for _ in range(10):
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=out).logits
        out = torch.cat([out, logits[:, -1:].argmax(-1)], dim=1)
    return out


def make(name: str, changes: dict) -> None:
    """Write one folder."""
    torch.manual_seed(0)
    config = T5Config(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    model = T5ForConditionalGeneration(config).eval()
    if name == "gated":
        head = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * 0.3)
        model.lm_head.weight = head
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms start as ones, which hide mistakes
            torch.nn.init.normal_(parameter, 0.7, 0.3)
        if "relative_attention_bias" in path:
            torch.nn.init.normal_(parameter, 0.0, 2.0)
    ids, mask = batch()
    answer = torch.randint(2, 32, (3, 9), generator=torch.Generator().manual_seed(2))
    answer[:, 0] = config.decoder_start_token_id
    answer_mask = torch.ones_like(answer)
    answer_mask[1, 6:] = 0
    answer_mask[2, 3:] = 0
    expected = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": answer * answer_mask,
        "decoder_attention_mask": answer_mask,
    }
    with torch.no_grad():
        logits = model(**expected).logits
        greedy = answers(model, ids, mask)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="6KB" if name == "relu" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected |= {"logits": logits, "greedy": greedy}
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def make_buckets() -> None:
    """Write the buckets of the distances -600 to 600, for both kinds of attention."""
    distances = torch.arange(-600, 601)
    tables = {}
    for buckets, most in BUCKETS:
        for both in (True, False):
            tables[f"{buckets} {most} {both}"] = T5Attention._relative_position_bucket(
                distances, bidirectional=both, num_buckets=buckets, max_distance=most
            )
    save_file(tables, HERE / "buckets.safetensors")


if __name__ == "__main__":
    for variant, changes in VARIANTS.items():
        make(variant, changes)
    make_buckets()
