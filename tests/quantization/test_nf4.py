"""NF4: the codes, scales and values of bitsandbytes, bit by bit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import StructureError
from jax_lora.quantization import nf4

FILE = Path(__file__).parents[1] / "fixtures" / "nf4" / "reference.npz"


@pytest.fixture(scope="module")
def reference():
    """What bitsandbytes made of a matrix of 48 outputs and 128 inputs."""
    with np.load(FILE) as arrays:
        return dict(arrays)


def test_the_table_of_scales_is_the_reference(reference):
    np.testing.assert_array_equal(nf4.scale_table(), reference["table"])


def test_codes_and_scales_are_the_reference(reference):
    made = nf4.encode(reference["w"])
    np.testing.assert_array_equal(made["codes"], reference["codes"])
    np.testing.assert_array_equal(made["scales"].reshape(-1), reference["scales"])
    np.testing.assert_array_equal(made["spans"], reference["spans"])
    assert made["offset"] == reference["offset"]


@pytest.mark.parametrize("compile", [False, True])
def test_values_are_the_reference_bit_by_bit(reference, compile):
    arrays = {name: reference[name] for name in ("codes", "spans", "offset")}
    arrays["scales"] = reference["scales"].reshape(48, 2)
    decode = jax.jit(nf4.decode) if compile else nf4.decode
    got = np.asarray(decode(jax.tree.map(jnp.asarray, arrays)))
    assert got.tobytes() == reference["values"].tobytes()


def test_a_stack_of_kernels_is_quantized_kernel_by_kernel(reference):
    kernel = jnp.asarray(reference["w"].T)  # (in, out)
    stack = jnp.stack([kernel, 2 * kernel])
    fn = lambda p, x: jax.lax.scan(lambda h, w: (h @ w @ w.T, None), x, p["w"])[0]  # noqa: E731
    x = jnp.ones((2, 128))
    kernels = jl.find_kernels(fn, {"w": stack}, x)
    stored = jl.quantize({"w": stack}, "nf4", targets="w", kernels=kernels)
    assert stored["w"].arrays["codes"].shape == (2, 48, 64)
    made = np.asarray(jl.dequantize(stored)["w"])
    np.testing.assert_array_equal(made[0], reference["values"].T)
    np.testing.assert_array_equal(made[1], 2 * reference["values"].T)
    got = jl.lora_apply(fn)(stored, x)
    np.testing.assert_allclose(got, fn({"w": jnp.asarray(made)}, x), rtol=1e-4, atol=1e-5)


def test_large_kernels_take_less_than_0_52_bytes_an_element():
    stored = jl.quantize({"kernel": jnp.ones((512, 256), jnp.bfloat16)}, "nf4")["kernel"]
    assert (stored.shape, stored.dtype, stored.method) == ((512, 256), jnp.bfloat16, "nf4")
    assert stored.nbytes <= 0.52 * 512 * 256


@pytest.mark.parametrize(
    ("equation", "shape"), [("td,dhc->thc", (128, 4, 12)), ("thc,hcd->td", (4, 32, 48))]
)
def test_kernels_of_heads_have_blocks_along_their_inputs(reference, equation, shape):
    values = jnp.asarray(reference["w"].T).reshape(shape)
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])  # noqa: E731
    x = jnp.ones((3, 128) if len(shape) == 3 and shape[0] == 128 else (3, *shape[:2]))
    kernels = jl.find_kernels(fn, {"w": values}, x)
    stored = jl.quantize({"w": values}, "nf4", targets="w", kernels=kernels)
    np.testing.assert_array_equal(
        jl.dequantize(stored)["w"].reshape(128, 48), reference["values"].T
    )


def test_the_error_is_that_of_16_values_in_blocks():
    w = jax.random.normal(jax.random.key(0), (512, 512))
    made = jl.dequantize(jl.quantize({"kernel": w}, "nf4"))["kernel"]
    error = float(jnp.linalg.norm(made - w) / jnp.linalg.norm(w))
    assert 0.08 < error < 0.1  # int8 with a scale per output: 0.006 to 0.009


def test_it_is_refused_inside_jit():
    with pytest.raises(StructureError, match="quantize: kernel\n  got:      an array inside"):
        jax.jit(lambda w: jl.quantize({"kernel": w}, "nf4")["kernel"].arrays)(jnp.ones((64, 8)))
