"""Adapters of transformers 4 give W + scale * B @ A for each expert."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_lora as jl
from jax_lora.errors import AdapterFileError

from .peft_cases import FIXTURES, logits_of

PREFIX = "base_model.model.model.layers"
EXPERTS = 4
MIXTRAL = ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"))
QWEN = ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"))
each_family = pytest.mark.parametrize("family", [MIXTRAL, QWEN], ids=["mixtral", "qwen"])


@functools.cache
def base_of(family):
    model, params = jl.models.load(FIXTURES / family[0] / "tied")
    return model, {"params": params}


def weights_of(variables, family) -> dict[str, np.ndarray]:
    """The weight of every expert and router as in transformers 4, (out, in), by module name."""
    _, block, (gate, up, down) = family
    mlp = variables["params"]["layers"]["mlp"]
    fused = np.asarray(mlp["experts"]["gate_up_proj"])  # (layers, experts, in, 2 * width)
    halves = np.split(fused, 2, axis=-1)
    found = {}
    for layer in range(fused.shape[0]):
        found[f"{layer}.{block}.gate"] = np.asarray(mlp["gate"]["kernel"])[layer].T
        stacks = (*halves, np.asarray(mlp["experts"]["down_proj"]))
        for name, stack in zip((gate, up, down), stacks, strict=True):
            for expert in range(EXPERTS):
                found[f"{layer}.{block}.experts.{expert}.{name}"] = stack[layer, expert].T
    return found


def write(folder, modules, ranks=None, **config):
    """An adapter for modules -> weights, and its updates scale * B @ A by module."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    rng, tensors, updates = np.random.default_rng(0), {}, {}
    for module, weight in modules.items():
        rank = (ranks or {}).get(module, config["r"])
        a = rng.normal(size=(rank, weight.shape[1])).astype(np.float32)
        b = rng.normal(size=(weight.shape[0], rank)).astype(np.float32)
        tensors[f"{PREFIX}.{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}.{module}.lora_B.weight"] = b
        alpha = config.get("alpha_pattern", {}).get(module.split(".")[-1], config["lora_alpha"])
        root = np.sqrt(rank) if config.get("use_rslora") else rank
        updates[module] = alpha / root * b @ a
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors, updates


def check(folder, family, updates):
    """The merged weights are those of the updates."""
    model, variables = base_of(family)
    adapter = jl.peft.load(folder, variables, names=model.hf_names)
    merged = jl.merge(variables, adapter)
    before, after = weights_of(variables, family), weights_of(merged, family)
    for module, weight in before.items():
        want = weight + updates.get(module, np.zeros_like(weight))
        np.testing.assert_allclose(after[module], want, atol=1e-5, err_msg=module)
    return model, variables, adapter


@each_family
@pytest.mark.parametrize("use_rslora", [False, True])
def test_all_experts_and_routers_of_a_file(tmp_path, family, use_rslora):
    modules = weights_of(base_of(family)[1], family)
    _, updates = write(
        tmp_path, modules, target_modules=["gate", *family[2]], use_rslora=use_rslora
    )
    _, _, adapter = check(tmp_path, family, updates)
    ranks = {path.rpartition("/")[2]: pair.rank for path, pair in adapter.pairs.items()}
    assert ranks == {"kernel": 2, "gate_up_proj": 4, "down_proj": 2}


@each_family
def test_experts_may_be_missing_or_differ_in_rank_and_scale(tmp_path, family):
    gate, up, down = family[2]
    modules = weights_of(base_of(family)[1], family)
    left_out = (f"experts.1.{up}", f"experts.2.{gate}", f"experts.2.{up}", f"1.{down}", ".gate")
    modules = {name: each for name, each in modules.items() if not name.endswith(left_out)}
    ranks = {name: 3 for name in modules if f"experts.3.{gate}" in name or f".0.{down}" in name}
    alphas = {gate: 16, down: 5}
    targets = [f"model.layers.{name}" for name in modules]
    _, updates = write(tmp_path, modules, ranks, target_modules=targets, alpha_pattern=alphas)
    model, variables, adapter = check(tmp_path, family, updates)
    ids = np.arange(16).reshape(2, 8)
    combined = logits_of(model, jl.combine(variables, adapter), ids)
    merged = logits_of(model, jl.merge(variables, adapter), ids)
    np.testing.assert_allclose(combined, merged, atol=1e-4)
    # The export has the parameters of transformers 5, and the same updates.
    jl.peft.save(tmp_path / "5", adapter, names=model.hf_names)
    config = json.loads((tmp_path / "5" / "adapter_config.json").read_text())
    assert {"experts.down_proj", "experts.gate_up_proj"} <= {
        ".".join(name.split(".")[-2:]) for name in config["target_parameters"]
    }
    check(tmp_path / "5", family, updates)


@each_family
def test_a_file_of_down_projections_alone_is_exported_as_parameters(tmp_path, family):
    down = family[2][2]
    modules = weights_of(base_of(family)[1], family)
    modules = {name: each for name, each in modules.items() if name.endswith(down)}
    _, updates = write(tmp_path, modules, target_modules=[down], lora_dropout=0.1)
    model, _, adapter = check(tmp_path, family, updates)
    assert adapter.config.dropout == 0.1
    jl.peft.save(tmp_path / "5", adapter, names=model.hf_names)
    config = json.loads((tmp_path / "5" / "adapter_config.json").read_text())
    assert (config["target_parameters"], config["target_modules"]) == (["experts.down_proj"], None)
    assert config["lora_dropout"] == 0.0, "PEFT has no dropout for parameters"
    check(tmp_path / "5", family, updates)


def test_the_magnitudes_of_gate_and_up_are_those_of_their_columns(tmp_path):
    model, variables = base_of(MIXTRAL)
    modules = weights_of(variables, MIXTRAL)
    modules = {name: each for name, each in modules.items() if ".experts.2." in name}
    tensors, updates = write(tmp_path, modules, target_modules=list(modules), use_dora=True)
    expected = {}
    for number, (module, weight) in enumerate(modules.items()):
        changed = weight + updates[module]
        magnitude = np.linspace(1, 2 + number, len(weight), dtype=np.float32)
        tensors[f"{PREFIX}.{module}.lora_magnitude_vector"] = magnitude
        norms = np.linalg.norm(changed, axis=1)
        expected[module] = (magnitude / norms)[:, None] * changed - weight
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    _, _, adapter = check(tmp_path, MIXTRAL, expected)
    with pytest.raises(AdapterFileError, match="PEFT has neither DoRA nor biases of B for them"):
        jl.peft.save(tmp_path / "5", adapter, names=model.hf_names)
    gone = next(iter(modules))
    del tensors[f"{PREFIX}.{gone}.lora_magnitude_vector"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=rf"missing: model.layers.{gone}.lora_magnitude_vec"):
        jl.peft.load(tmp_path, variables, names=model.hf_names)


def test_fully_trained_experts_are_columns_of_the_leaf(tmp_path):
    modules = weights_of(base_of(QWEN)[1], QWEN)
    few = {name: each for name, each in modules.items() if ".experts.1." in name}
    tensors, _ = write(tmp_path, {}, target_modules=[], modules_to_save=["up_proj", "down_proj"])
    updates = {}
    for module, weight in few.items():
        if not module.endswith("gate_proj"):
            updates[module] = np.ones_like(weight)
            tensors[f"{PREFIX}.{module}.weight"] = np.add(weight, 1, order="C")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    check(tmp_path, QWEN, updates)


@each_family
def test_one_message_names_the_experts_that_do_not_fit(tmp_path, family):
    gate, up, down = family[2]
    model, variables = base_of(family)
    modules = weights_of(variables, family)
    tensors, _ = write(tmp_path, modules, target_modules=["gate", gate, up, down])
    stem = f"{PREFIX}.0.{family[1]}.experts"
    tensors[f"{stem}.9.{gate}.lora_A.weight"] = np.ones((2, 16), np.float32)
    tensors[f"{stem}.1.{up}.lora_B.weight"] = np.ones((24, 2), np.float32)
    del tensors[f"{stem}.2.{down}.lora_A.weight"], tensors[f"{stem}.2.{down}.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError) as caught:
        jl.peft.load(tmp_path, variables, names=model.hf_names)
    stem = stem.removeprefix("base_model.model.")
    for line in (
        "3 problems",
        f"extra: {stem}.9.{gate}.lora_A.weight (2, 16); the closest modules are {stem}.",
        f"wrong shape: {stem}.1.{up}.lora_B.weight is (24, 2), expected (12, 2)",
        f"missing: {stem}.2.{down}.lora_A.weight, which the configuration names",
    ):
        assert line in str(caught.value)
