import jax
import jax.numpy as jnp
import pytest

import jax_lora as jl
from jax_lora.errors import StructureError
from jax_lora.summary import summary


def toy():
    params = {
        "layers": {"q_proj": {"kernel": jnp.zeros((3, 16, 32), jnp.bfloat16)}},
        "head": {"kernel": jnp.zeros((32, 5), jnp.bfloat16), "bias": jnp.zeros(5)},
        "step": jnp.int32(0),
    }
    pair = jl.LoraPair(
        jnp.zeros((3, 16, 4)), jnp.zeros((3, 4, 32)), (1,), (2,), (0,), scale=(0.5, 0.5, 2.0)
    )
    config = jl.LoraConfig(rank=4)
    return params, jl.Adapter({"layers/q_proj/kernel": pair}, {"head/bias": jnp.zeros(5)}, config)


def test_counts_are_those_of_the_formulas():
    counted = summary(*toy())
    factors = 3 * 4 * (16 + 32)
    assert counted.trainable == factors + 5
    assert counted.total == 3 * 16 * 32 + 32 * 5 + 5 + 1 + factors
    assert counted.adapter_bytes == 4 * (factors + 5)
    assert counted.base_bytes == 2 * (3 * 16 * 32 + 32 * 5) + 4 * 5 + 4
    assert counted.percent == pytest.approx(100 * counted.trainable / counted.total)


def test_rows_tell_shape_rank_and_the_range_of_scales():
    pair, bias = summary(*toy()).rows
    assert (pair.path, pair.kind, pair.shape) == ("layers/q_proj/kernel", "lora", (3, 16, 32))
    assert (pair.rank, pair.scale, pair.trainable) == (4, (0.5, 2.0), 576)
    assert (bias.path, bias.kind, bias.rank, bias.scale) == ("head/bias", "whole", None, None)


def test_the_table_is_plain_text():
    assert str(summary(*toy())) == "\n".join(
        [
            "leaf                  shape         rank   scale  trainable",
            "-----------------------------------------------------------",
            "layers/q_proj/kernel  (3, 16, 32)      4  0.5..2        576",
            "head/bias             (5,)         whole       -          5",
            "-----------------------------------------------------------",
            "trainable 581 of 2,278 (25.50%)",
            "adapter 2.3 kB, base 3.4 kB",
        ]
    )


def test_long_and_unprintable_paths_stay_within_a_hundred_columns():
    name = "decoder_" * 20 + "\x1b[31m"
    pair = jl.LoraPair(jnp.zeros((12, 12288, 64)), jnp.zeros((12, 64, 128, 96)), (1,), (2, 3), (0,))
    path = f"{name}/kernel"
    adapter = jl.Adapter({path: pair}, {}, jl.LoraConfig(rank=64))
    params = {name: {"kernel": jax.ShapeDtypeStruct((12, 12288, 128, 96), jnp.float32)}}
    text = str(summary(params, adapter))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "..." in text


def test_shapes_alone_and_combined_trees_give_the_same_table():
    params, adapter = toy()
    expected = str(summary(params, adapter))
    shapes = jax.eval_shape(lambda: (params, adapter))
    assert str(summary(*shapes)) == expected
    assert str(summary(jl.combine(params, adapter))) == expected


def test_an_adapter_that_does_not_fit_is_refused():
    params, adapter = toy()
    del params["layers"]
    with pytest.raises(StructureError, match="layers/q_proj/kernel: not in the tree"):
        summary(params, adapter)
