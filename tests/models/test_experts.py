"""Mixtures of experts: routing, loads, and adapters on each expert."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import jax_lora as jl
from jax_lora.models import MixtralConfig, load
from jax_lora.models.decoder_config import ExpertSizes
from jax_lora.models.experts import SparseMLP, route
from tests.lora_cases import random_tree

FIXTURE = Path(__file__).parent.parent / "fixtures" / "qwen3_moe" / "tied"
CONFIG = MixtralConfig(
    hidden_size=8, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5
)
SIZES = ExpertSizes(total=4, per_token=2, width=6, normalized=True)
PART = SparseMLP(CONFIG, jnp.float32, SIZES)
TOKENS = random_tree((2, 5, 8), 1)  # (batch, tokens, hidden)


@pytest.fixture(scope="module")
def params():
    return jax.jit(PART.init)(jax.random.key(0), TOKENS)["params"]


def one_by_one(params, tokens, normalized=True):
    """The same, a token and an expert at a time."""
    gate_up, down = (np.asarray(params["experts"][k]) for k in ("gate_up_proj", "down_proj"))
    answers = []
    for token in np.asarray(tokens).reshape(-1, 8):
        logits = token @ np.asarray(params["gate"]["kernel"])
        weights = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-weights)[:2]
        total = weights[chosen].sum() if normalized else 1.0
        answer = np.zeros(8)
        for expert in chosen:
            gate, up = np.split(token @ gate_up[expert], 2)
            hidden = gate / (1 + np.exp(-gate)) * up
            answer += weights[expert] / total * (hidden @ down[expert])
        answers.append(answer)
    return np.stack(answers).reshape(tokens.shape)


@pytest.mark.parametrize("normalized", [True, False])
def test_experts_together_equal_experts_one_by_one(params, normalized):
    part = PART.clone(sizes=SIZES._replace(normalized=normalized))
    together = jax.jit(part.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(together, one_by_one(params, TOKENS, normalized), atol=1e-5)


def test_no_token_is_dropped_when_all_choose_the_same_experts(params):
    same = jnp.broadcast_to(TOKENS[:1, :1], (2, 50, 8))
    together = jax.jit(PART.apply)({"params": params}, same)
    np.testing.assert_allclose(together, one_by_one(params, same), atol=1e-5)


def test_an_expert_that_no_token_visits_gets_no_gradient(params):
    kernel = params["gate"]["kernel"]
    never = {**params, "gate": {"kernel": kernel.at[:, 2].set(-100.0)}}  # tokens are positive

    def loss(params):
        return jnp.square(PART.apply({"params": params}, jnp.abs(TOKENS))).sum()

    grads = jax.jit(jax.grad(loss))(never)["experts"]
    logits = jnp.abs(TOKENS) @ never["gate"]["kernel"]
    visited = set(np.asarray(route(logits, 2, True)[1]).ravel().tolist())
    assert 2 not in visited
    for grad in grads.values():
        assert set(np.flatnonzero(jnp.abs(grad).sum((1, 2))).tolist()) == visited


def test_routing_is_float32_for_every_dtype_of_the_logits():
    weights, indices = route(jnp.array([[1.0, 3.0, 2.0]], jnp.bfloat16), 2, False)
    assert (weights.dtype, indices.tolist()) == (jnp.float32, [[1, 2]])
    np.testing.assert_allclose(weights, jax.nn.softmax(jnp.array([[1.0, 3.0, 2.0]]))[:, 1:], 1e-6)


def test_every_expert_has_separate_factors_and_the_router_is_adapted_if_it_is_named(params):
    variables = {"params": params}
    kernels = jl.find_kernels(PART.apply, variables, TOKENS)
    assert kernels["params/experts/down_proj"].stack_axes == (0,)

    def adapt(targets):
        config = jl.LoraConfig(rank=2, targets=targets)
        return jl.lora_init(jax.random.key(0), variables, config, kernels=kernels)

    shapes = {"params/experts/down_proj": (4, 6, 2), "params/experts/gate_up_proj": (4, 8, 2)}
    for targets in ("all-linear", "mlp"):
        adapter = adapt(targets)
        assert {path: pair.a.shape for path, pair in adapter.pairs.items()} == shapes
        for pair in adapter.pairs.values():  # no two experts start from the same factors
            assert len(np.unique(pair.a.reshape(4, -1), axis=0)) == 4
        assert "experts: 4 of 4" in str(jl.summary(variables, adapter))
    adapter = adapt(["gate"])
    assert [*adapter.pairs] == ["params/gate/kernel"]
    assert "experts: 0 of 4" in str(jl.summary(variables, adapter))


def test_experts_that_lie_on_different_devices_give_the_same_logits():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))

    def place(path, shape):
        spec = P(None, "expert") if "/experts/" in path else P()
        return NamedSharding(mesh, spec)

    model, params = load(FIXTURE, sharding=place)
    down = params["layers"]["mlp"]["experts"]["down_proj"]
    assert down.addressable_shards[0].data.shape == (2, 1, 12, 16)
    stored = load_file(FIXTURE / "expected.safetensors")
    logits = jax.jit(model.apply)(
        {"params": params}, jnp.asarray(stored["input_ids"][:1], jnp.int32)
    )
    np.testing.assert_allclose(logits, stored["logits"][:1], atol=1e-4)
