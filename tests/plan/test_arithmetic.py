"""Compare the formulas with values that were counted or measured independently."""

import dataclasses

import pytest

from jax_lora.finetune import losses
from jax_lora.plan.arithmetic import (
    MOST_LOGITS,
    KernelShape,
    ModelShape,
    Residuals,
    Step,
    activation_bytes,
    adapter_size,
    full_flops,
    layer_bytes,
    logit_bytes,
    lora_flops,
    nf4_bytes,
    optimizer_bytes,
    weight_bytes,
)


def decoder(layers, width, inner, vocabulary, heads):
    """The shape of a Llama without grouped-query attention."""
    sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    sizes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    kernels = [
        KernelShape(n, *size, layers, layers * size[0] * size[1]) for n, size in sizes.items()
    ]
    head = width * vocabulary
    kernels.append(KernelShape("head", width, vocabulary, 1, head, is_head=True))
    kernels.append(KernelShape("table", vocabulary, width, 1, 0, kind="embedding"))
    return ModelShape(
        "small", tuple(kernels), 0, width, layers, heads, heads, width // heads, inner, vocabulary
    )


# The decoder of docs/performance.md, whose operations were counted in the jaxpr.
MEASURED = decoder(6, 384, 1024, 2048, 6)
STEP = Step(batch_size=4, length=256, targets=256)


def test_full_fine_tuning_needs_six_operations_per_weight_and_token_and_attention():
    assert full_flops(MEASURED, STEP) == pytest.approx(77.31e9, rel=1e-4)


def test_lora_saves_weight_gradients_and_adds_low_rank_products():
    # The layers there are unrolled, so q, k and v of the first layer need no gradient of x.
    first = 2 * STEP.tokens * 3 * (384**2 + 384 * 8)
    assert lora_flops(MEASURED, STEP, 8) - first == pytest.approx(55.18e9, rel=1e-4)


def test_remat_adds_a_forward_pass_through_the_layers():
    again = dataclasses.replace(STEP, remat=True)
    more = full_flops(MEASURED, again) - full_flops(MEASURED, STEP)
    assert more == pytest.approx((77.31e9 - 3 * 2 * 1024 * 384 * 2048) / 3, rel=1e-4)


def test_accumulation_multiplies_operations_but_not_memory():
    parts = dataclasses.replace(STEP, accumulation=4)
    assert lora_flops(MEASURED, parts, 8) == 4 * lora_flops(MEASURED, STEP, 8)
    assert activation_bytes(MEASURED, parts, 4) == activation_bytes(MEASURED, STEP, 4)


def test_fewer_adapted_kernels_need_fewer_operations_and_parameters():
    some = MEASURED.body[:2]
    assert lora_flops(MEASURED, STEP, 8, some) < lora_flops(MEASURED, STEP, 8)
    assert adapter_size(some, 8) == 2 * 6 * 8 * (384 + 384)


def test_remat_keeps_the_inputs_of_all_layers_and_one_recomputed_layer():
    again = dataclasses.replace(STEP, remat=True)
    inputs = 6 * 1024 * 384 * 4
    most_of_one = 0.75 * layer_bytes(MEASURED, again, 4)
    assert activation_bytes(MEASURED, again, 4) == inputs + most_of_one


def test_traced_residuals_replace_the_formula():
    residuals = Residuals(fixed=600.0, by_length=6.0, remat_fixed=10.0, remat_by_length=0.0)
    again = dataclasses.replace(STEP, remat=True)
    everything = 1024 * (600 + 6 * 256)
    assert activation_bytes(MEASURED, STEP, 4, residuals=residuals) == everything
    assert (
        activation_bytes(MEASURED, again, 4, residuals=residuals)
        == 10 * 1024 + 0.75 * everything / 6
    )


def test_attention_scores_grow_with_the_square_of_the_length():
    short, long = (Step(1, length, length) for length in (1000, 2000))
    per_token = [layer_bytes(MEASURED, step, 4) / step.tokens for step in (short, long)]
    assert per_token[1] - per_token[0] == 6 * 1000 * 8


def test_loss_chunks_bound_the_logits():
    chunked = dataclasses.replace(STEP, loss_chunk=128)
    assert logit_bytes(MEASURED, STEP) == 2 * 1024 * 2048 * 4
    assert logit_bytes(MEASURED, chunked) == 2 * 128 * 2048 * 4
    assert logit_bytes(MEASURED, dataclasses.replace(STEP, loss_chunk=4096)) == 2 * 1024 * 2048 * 4


def test_only_dense_kernels_except_the_head_are_quantized():
    body = sum(kernel.size for kernel in MEASURED.body)
    rest = (MEASURED.size - body) * 2
    outputs = sum(kernel.count * kernel.outputs for kernel in MEASURED.body)
    assert weight_bytes(MEASURED, 2, "int8") == body + 4 * outputs + rest
    assert weight_bytes(MEASURED, 2, "nf4") == pytest.approx(body * 4.127 / 8 + rest, rel=1e-4)
    assert weight_bytes(MEASURED, 2) == MEASURED.size * 2


def test_nf4_needs_the_bits_of_the_qlora_paper():
    assert 8 * nf4_bytes(4096, 4096) / 4096**2 == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "size"), [("adamw", 2), ("lion", 1), ("sgd", 0), ("unknown", 2)]
)
def test_optimizer_state_depends_on_the_optimizer(optimizer, size):
    assert optimizer_bytes(1000, 4, optimizer) == size * 4000


def test_jax_is_not_imported():
    import subprocess
    import sys
    from pathlib import Path

    file = Path(__file__).parents[2] / "jax_lora" / "plan" / "arithmetic.py"
    program = (
        "import runpy, sys; names = runpy.run_path(sys.argv[1]); "
        "assert names['pair_size'](4096, 4096, 8) == 65536; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(file)], check=True)


def test_the_loss_computes_as_many_logits_at_a_time():
    assert MOST_LOGITS == losses.MOST_LOGITS
