"""PEFT loads the saved adapters of GPT-2, BERT, RoBERTa and T5, with equal logits.

Runs where torch, transformers and peft are installed beside the package.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.models import add_classifier, load, save

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FIXTURES = Path(__file__).parent.parent / "fixtures"
IDS = np.array([[2, 3, 4, 5, 6], [7, 8, 9, 4, 3]], np.int32)


def trained(model, params, inputs, whole=()):
    """Variables with an adapter of random numbers in every dense kernel, and what they compute."""
    variables = {"params": params}
    kernels = jl.find_kernels(model.apply, variables, IDS, **inputs)
    config = jl.LoraConfig(rank=2, targets="all-linear", modules_to_save=whole)
    adapter = jl.lora_init(jax.random.key(1), variables, config, kernels=kernels)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape)  # noqa: E731
    lora_variables = jl.combine(variables, jax.tree.map(noise, adapter))
    return lora_variables, jl.lora_apply(model.apply)(lora_variables, IDS, **inputs)


def served(auto, base, adapter_folder, inputs):
    """What PyTorch computes with the adapter."""
    model = auto.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, adapter_folder).eval()
    given = {"input_ids": IDS, **inputs}
    with torch.no_grad():
        return model(**{k: torch.tensor(np.asarray(v)).long() for k, v in given.items()}).logits


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifier_with_its_new_head(family, tmp_path):
    model, params = load(FIXTURES / family / "masked_lm")
    model, params = add_classifier(jax.random.key(0), model, params, ["a", "b", "c"])
    save(tmp_path / "base", model, params)
    heads = tuple(part for part in ("pooler", "classifier") if part in params)
    inputs = {"attention_mask": jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    variables, ours = trained(model, params, inputs, heads)
    base, adapter = jl.partition(variables)
    jl.peft.save(tmp_path / "adapter", adapter, names=model.hf_names, base_model="base")
    auto = transformers.AutoModelForSequenceClassification
    theirs = served(auto, tmp_path / "base", tmp_path / "adapter", inputs)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    again = jl.peft.load(tmp_path / "adapter", base, names=model.hf_names)
    same = jl.lora_apply(model.apply)(jl.combine(base, again), IDS, **inputs)
    np.testing.assert_array_equal(ours, same)


@pytest.mark.parametrize("variant", ["gpt2/scaled", "gpt2/untied", "t5/gated", "t5/relu"])
def test_a_language_model(variant, tmp_path):
    model, params = load(FIXTURES / variant)
    inputs = {"decoder_input_ids": IDS} if variant.startswith("t5") else {}
    variables, ours = trained(model, params, inputs)
    adapter = jl.partition(variables)[1]
    jl.peft.save(tmp_path, adapter, names=model.hf_names, base_model="base")
    auto = transformers.AutoModelForCausalLM
    if variant.startswith("t5"):
        auto = transformers.AutoModelForSeq2SeqLM
    theirs = served(auto, FIXTURES / variant, tmp_path, inputs)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("variant", ["gpt2/untied", "bert/masked_lm", "roberta/masked_lm"])
def test_a_model_saved_here_with_a_configuration_of_ours_computes_the_same(variant, tmp_path):
    model, params = load(FIXTURES / variant)
    model = model.clone(config=type(model.config)(**{**vars(model.config), "source": ""}))
    save(tmp_path, model, params)
    auto = transformers.AutoModelForMaskedLM
    if variant.startswith("gpt2"):
        auto = transformers.AutoModelForCausalLM
    with torch.no_grad():
        theirs = auto.from_pretrained(tmp_path).eval()(torch.tensor(IDS).long()).logits
    ours = jax.jit(model.apply)({"params": params}, IDS)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
