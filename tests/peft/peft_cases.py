"""Folders that PEFT wrote, each with its base model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jax_lora as jl

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDERS = FIXTURES / "peft"
# Adapters that change one end of a tied table alone.
UNTIED = ("tied_embedding", "tied_resized_replication", "tied_whole_ends", "tied_whole_lookup")
CASES = sorted(folder.name for folder in FOLDERS.iterdir())


def base_of(case: str):
    """The model and parameters that an adapter is for, changed as it needs them."""
    facts = json.loads((FOLDERS / case / "base.json").read_text())
    model, params = jl.models.load(FIXTURES / facts["model"])
    if case == "tied_resized_replication":  # the rows of new tokens are in the file
        model, params, _ = jl.peft.load_model(FOLDERS / case, model, params)
        return model, {"params": params}
    if case in UNTIED:
        model, params = jl.models.untie(model, params)
    if facts["resize"]:
        model, params = jl.models.resize_vocab(model, params, facts["resize"])
    if facts["replicate"]:
        model, params = jl.models.replicate_layers(model, params, facts["replicate"])
    return model, {"params": params}


def load_case(case: str, **options):
    """A case's model, variables and adapter."""
    model, variables = base_of(case)
    return (
        model,
        variables,
        jl.peft.load(FOLDERS / case, variables, names=model.hf_names, **options),
    )


def expected_of(case: str):
    """What PyTorch gives: the batch, and its logits."""
    expected = load_file(FOLDERS / case / "expected.safetensors")
    return jnp.asarray(expected.pop("input_ids").astype(np.int32)), expected


def logits_of(model, variables, ids):
    """`model.apply`, compiled, on plain or combined variables."""
    apply = jl.lora_apply(model.apply, on_materialize="allow")
    return jax.jit(lambda variables: apply(variables, ids))(variables)
