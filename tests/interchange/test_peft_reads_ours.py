"""PEFT loads what is written here, and PyTorch then gives our logits.

Runs where torch, transformers and peft are installed beside the package.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jax_lora as jl

from ..peft.peft_cases import (
    CASES,
    FIXTURES,
    FOLDERS,
    UNTIED,
    expected_of,
    load_case,
    logits_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kept", [True, False], ids=["its own configuration", "a new one"])
@pytest.mark.parametrize("case", CASES)
def test_pytorch_gives_our_logits_with_the_files_that_are_written_here(case, kept, tmp_path):
    facts = json.loads((FOLDERS / case / "base.json").read_text())
    if facts["replicate"] and not kept:
        pytest.skip("the layers were repeated before the adapter was loaded")
    if case in UNTIED and not kept:
        pytest.skip("the model was untied before the adapter was loaded")
    model, variables, adapter = load_case(case)
    changed = jax.tree.map(lambda leaf: leaf * np.float32(1.25), adapter)  # no copy of the file
    if not kept:
        config = dataclasses.replace(adapter.config, metadata={})
        changed = dataclasses.replace(changed, config=config)
    rows = variables if facts["resize"] else None  # of new tokens, which the base lacks
    jl.peft.save(tmp_path, changed, names=model.hf_names, base_model="base", base=rows)

    base = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / facts["model"])
    if facts["resize"]:
        base.resize_token_embeddings(facts["resize"])
    served = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids, _ = expected_of(case)
    with torch.no_grad():
        theirs = served(input_ids=torch.tensor(np.asarray(ids), dtype=torch.int64)).logits
    ours = logits_of(model, jl.combine(variables, changed), ids)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=1e-4)
