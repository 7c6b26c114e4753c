"""Make tests/fixtures/generation: what transformers generates, and how it filters logits.

    python -m venv torch-env
    torch-env/bin/pip install torch transformers
    torch-env/bin/python tests/make_fixtures/generation.py

The models are those of the other fixtures. `greedy.safetensors` holds a batch of unequal prompts,
padded on the left, and `generate(do_sample=False)` of it for each model, with an end token that
some rows meet. `filters.safetensors` holds logits and the distributions that are left of them.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent.parent / "fixtures"
MODELS = ("llama/tied", "llama/untied", "gemma2/capped", "gpt2/tied", "qwen3_moe/tied")
PROMPTS = ([5, 9, 7], [20, 3, 11, 30, 2, 8, 6, 4, 17], [8], [12, 25, 31, 9, 14, 22])
NEW = 8
# temperature, top_k (0: off), top_p (1: off)
SETTINGS = (
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.0, 5, 1.0),
    (1.0, 0, 0.9),
    (0.7, 5, 0.8),
    (1.5, 10, 0.95),
    (0.3, 1, 0.5),
    (2.0, 64, 0.05),
)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts, padded on the left."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return ids, mask


def greedy() -> dict[str, torch.Tensor]:
    """For each model: an end token that half of the rows meet, and what is generated."""
    ids, mask = batch()
    made = {"input_ids": ids, "attention_mask": mask}
    for name in MODELS:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            HERE / name, attn_implementation="eager", dtype=torch.float32
        ).eval()
        settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 1}
        free = model.generate(ids, attention_mask=mask, eos_token_id=[], **settings)
        answers = free[:, ids.shape[1] :].tolist()
        # The token that ends rows in the most different places.
        end = max(range(2, 32), key=lambda token: _spread(answers, token))
        made[f"{name}/eos"] = torch.tensor(end)
        made[f"{name}/ids"] = model.generate(ids, attention_mask=mask, eos_token_id=end, **settings)
        print(name, end, made[f"{name}/ids"][:, ids.shape[1] :].tolist())
    return made


def _spread(answers: list[list[int]], token: int) -> int:
    return len({answer.index(token) if token in answer else NEW for answer in answers})


def filters() -> dict[str, torch.Tensor]:
    """For each setting logits, and the distribution that is left of them.

    Top-p cuts through ties as the sort happens to order them, so only top-k gets rows with ties.
    """
    distinct = torch.randn((6, 64), generator=torch.Generator().manual_seed(0)) * 2
    tied = torch.cat([distinct, distinct[:3].round()])
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / MODELS[0])
    made = {"settings": torch.tensor(SETTINGS, dtype=torch.float64)}
    for number, (temperature, top_k, top_p) in enumerate(SETTINGS):
        config = transformers.GenerationConfig(
            do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p
        )
        process = model._get_logits_processor(config)  # in transformers' own order
        logits = tied if top_p == 1 else distinct
        made[f"{number}/logits"] = logits.clone()
        made[f"{number}/left"] = process(None, logits.clone()).softmax(-1)
    return made


if __name__ == "__main__":
    folder = HERE / "generation"
    folder.mkdir(exist_ok=True)
    for file, tensors in (("greedy", greedy()), ("filters", filters())):
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / f"{file}.safetensors")
        (folder / f"{file}.safetensors").chmod(0o644)
