"""Make tests/fixtures/nf4/llama: a tiny Llama that bitsandbytes quantized, and torch's logits.

Needs torch, transformers, accelerate and bitsandbytes; run `python <this file>`. All sizes are
multiples of a block: on a CPU, bitsandbytes 0.50 misreads blocks that run on into the next row.
"""

import tempfile
from pathlib import Path

import bitsandbytes.functional as quantization
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent.parent / "fixtures" / "nf4" / "llama"
CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.2,
)
QUANTIZED = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QUANTIZED, dtype=torch.float32, device_map="cpu"
    )
model.save_pretrained(HERE)
# bitsandbytes lays its codes out anew for a CPU's products, so read them from the file.
stored = load_file(HERE / "model.safetensors")
plain = LlamaForCausalLM(CONFIG).eval()
for name, parameter in plain.named_parameters():
    parts = {part: each for part, each in stored.items() if part.startswith(name + ".")}
    if parts:
        state = quantization.QuantState.from_dict(parts, device=torch.device("cpu"))
        parameter.data = quantization.dequantize_4bit(stored[name], state)
    else:
        parameter.data = stored[name]
ids = torch.randint(2, 40, (2, 12), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    logits = plain(ids).logits
down = plain.model.layers[1].mlp.down_proj.weight.data.contiguous()
save_file({"ids": ids, "logits": logits, "down_proj": down}, HERE / "expected.safetensors")
