"""Training from a PEFT adapter matches PyTorch: loss, gradients, five steps of AdamW."""

import jax
import numpy as np
import optax

import jax_lora as jl

from .peft_cases import expected_of, load_case

FACTORS = {"a": "lora_A", "b": "lora_B"}


def test_loss_gradients_and_five_adamw_steps_equal_pytorchs():
    model, variables, adapter = load_case("plain")
    ids, expected = expected_of("plain")

    def loss(adapter):
        logits = jl.lora_apply(model.apply)(jl.combine(variables, adapter), ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    tx = optax.adamw(0.01, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)

    @jax.jit
    def update(adapter, state):
        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(gradients, state, adapter)
        return value, gradients, optax.apply_updates(adapter, updates), state

    state, losses = jax.jit(tx.init)(adapter), []
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to its integer step count
        for step in range(5):
            value, gradients, adapter, state = update(adapter, state)
            if step == 0:
                compare(gradients, expected, "gradient")
            losses.append(float(value))
    np.testing.assert_allclose(losses, expected["losses"], atol=1e-4)
    compare(adapter, expected, "trained")


def compare(tree, expected, what):
    for path, pair in tree.pairs.items():
        name = path.split("/")[-2]
        for factor, theirs in FACTORS.items():
            for layer in range(2):
                key = f"{what} base_model.model.model.layers.{layer}.self_attn.{name}"
                right = expected[f"{key}.{theirs}.default.weight"].T
                ours = np.asarray(getattr(pair, factor))[layer]
                np.testing.assert_allclose(ours, right, atol=1e-4)
