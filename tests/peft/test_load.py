"""Adapters from PEFT give the logits of PyTorch, combined and merged."""

import jax
import numpy as np
import pytest

import jax_lora as jl

from .peft_cases import CASES, expected_of, load_case, logits_of

# Every case is read by a fast test of `save`; the logits of these are compared by `make test-slow`.
VARIANTS = (
    "bfloat16", "dora_embedding", "head", "patterns", "replication", "router", "tied_embedding",
    "tokens_tied",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.slow] * (each in VARIANTS)) for each in CASES]
)
def test_logits_equal_pytorchs_with_the_adapter_combined_and_merged(case):
    model, variables, adapter = load_case(case)
    ids, expected = expected_of(case)
    base = logits_of(model, variables, ids)
    assert np.abs(base - expected["logits"]).max() > 1e-2, "the adapter has to matter"
    combined = logits_of(model, jl.combine(variables, adapter), ids)
    np.testing.assert_allclose(combined, expected["logits"], atol=1e-4)
    merged = logits_of(model, jax.jit(jl.merge)(variables, adapter), ids)
    np.testing.assert_allclose(merged, expected["logits"], atol=1e-4)


def test_a_base_may_be_views_of_numpy_arrays(tmp_path):
    base = {"kernel": np.zeros(12, np.float32).reshape(4, 3)}
    pair = jl.LoraPair(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))
    jl.peft.save(
        tmp_path, jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=2)), names={"kernel": "m"}
    )
    again = jl.peft.load(tmp_path, base, names={"kernel": "m"})
    assert again.pairs["kernel"].kernel_shape == (4, 3)
