"""Every attention kernel computes what dense attention computes, forward and backward."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_lora.models import attention_mask
from jax_lora.models.attention import attend, pad_tokens
from jax_lora.models.attention_mask import choose_kernel, make_masks
from jax_lora.models.blockwise_attention import blockwise_attention
from jax_lora.models.splash_attention import splash_attention

HALF = jnp.bfloat16


def draw(batch, tokens, heads, groups, channels, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=(batch, tokens, n, channels)), jnp.float32)
        for n in (heads, groups, groups)
    )


def packed(batch, tokens, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.sort(rng.integers(1, 4, (batch, tokens)), axis=1), jnp.int32)


def dense_attention(q, k, v, segments, window, soft_cap):
    """Softmax attention, written out."""
    tokens, repeats = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") / np.sqrt(q.shape[-1])
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    row, column = np.arange(tokens)[:, None], np.arange(tokens)[None]
    seen = column <= row
    if window is not None:
        seen = seen & (column > row - window)
    seen = jnp.broadcast_to(seen, scores.shape)
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")


def value_and_gradients(qkv, *attentions):
    weight = jnp.asarray(np.random.default_rng(2).normal(size=qkv[0].shape), jnp.float32)

    def each(attention):
        loss = lambda q, k, v: jnp.sum(attention(q, k, v) * weight)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 2))

    return jax.jit(lambda *qkv: [each(attention)(*qkv) for attention in attentions])(*qkv)


def check(attention, qkv, segments=None, window=None, soft_cap=None):
    dense = lambda q, k, v: dense_attention(q, k, v, segments, window, soft_cap)  # noqa: E731
    ours, theirs = value_and_gradients(qkv, attention, dense)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "is_packed", "soft_cap", "window"),
    [
        (37, 4, 2, False, None, None),
        (37, 4, 2, True, 3.0, 5),
        pytest.param(32, 3, 3, True, None, 24, marks=pytest.mark.slow),
        pytest.param(9, 2, 1, False, 3.0, None, marks=pytest.mark.slow),
    ],
)
def test_blocks_are_dense_attention(tokens, heads, groups, is_packed, soft_cap, window):
    qkv = draw(2, tokens, heads, groups, 8)
    segments = packed(2, tokens) if is_packed else None
    recent = None if window is None else jnp.int32(window)
    blocks = lambda q, k, v: blockwise_attention(  # noqa: E731
        q, k, v, segments, recent, scale=8**-0.5, soft_cap=soft_cap, block=8
    )
    check(blocks, qkv, segments, window, soft_cap)


def test_blocks_skip_keys_of_earlier_segments_and_outside_the_window():
    from jax_lora.models.blockwise_attention import _first_blocks, _Settings

    segments = jnp.asarray([[0] * 8 + [1] * 8], jnp.int32)
    first = lambda window: _first_blocks(  # noqa: E731
        _Settings(1.0, None, 4), segments, jnp.int32(window)
    ).tolist()
    assert first(100) == [0, 0, 2, 2]
    assert first(4) == [0, 0, 2, 2]
    assert _first_blocks(
        _Settings(1.0, None, 4), jnp.zeros((1, 16), jnp.int32), jnp.int32(2)
    ).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("window", "soft_cap", "is_packed"),
    [
        (40, 5.0, True),
        pytest.param(None, None, False, marks=pytest.mark.slow),
    ],
)
def test_splash_attention_is_dense_attention(window, soft_cap, is_packed):
    tokens = 150  # no multiple of what the kernel needs
    qkv = draw(2, tokens, 4, 2, 64)
    segments = packed(2, tokens) if is_packed else None
    (mask,) = make_masks("splash", tokens, tokens, (None, segments, None), [window], jnp.float32)
    splash = lambda q, k, v: splash_attention(  # noqa: E731
        q, k, v, mask, 64**-0.5, soft_cap, interpret=True
    )
    check(splash, qkv, segments, window, soft_cap)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ({"data": 2}, PartitionSpec("data")),
        pytest.param(
            {"fsdp": 2, "tensor": 2},
            PartitionSpec("fsdp", None, "tensor"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_splash_attention_runs_on_the_rows_and_heads_of_each_device(axes, spec):
    count = math.prod(axes.values())
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes))
    qkv, segments = draw(2, 130, count, count // 2, 64), packed(2, 130)
    given = (None, segments, None)
    (mask,) = make_masks("splash", 130, 130, given, [None], jnp.float32, mesh)
    rows = NamedSharding(mesh, PartitionSpec(spec[0]))
    got = jax.jit(lambda q, k, v: splash_attention(q, k, v, mask, 0.125, None, interpret=True))(
        *jax.device_put(qkv, rows)
    )
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), got.ndim)
    dense = jax.jit(lambda *qkv: dense_attention(*qkv, segments, None, None))(*qkv)
    np.testing.assert_allclose(got, dense, rtol=2e-4, atol=2e-4)


def test_the_bias_for_cudnn_separates_segments():
    segments = jnp.asarray([[1, 1, 2, 2, 0]], jnp.int32)
    (mask,) = make_masks("cudnn", 5, 5, (None, segments, None), [None], HALF)
    assert mask.bias is not None
    assert mask.bias.shape == (1, 1, 5, 5)
    assert mask.bias.dtype == HALF
    same = np.asarray(segments)[0][:, None] == np.asarray(segments)[0][None]
    np.testing.assert_array_equal(np.asarray(mask.bias[0, 0]) == 0, same)
    # The formula of the kernel, with this bias: what a mask of segments gives.
    biased, dense = jax.jit(
        lambda *qkv: (
            jax.nn.dot_product_attention(*qkv, np.float32(mask.bias), is_causal=True),
            dense_attention(*qkv, segments, None, None),
        )
    )(*draw(1, 5, 2, 2, 8))
    np.testing.assert_allclose(biased, dense, rtol=1e-5, atol=1e-6)


def test_padding_is_a_segment_of_its_own():
    real = jnp.asarray([[0, 1, 1, 1, 0]], jnp.int32)
    (mask,) = make_masks("blocks", 5, 5, (real, None, None), [None], HALF)
    assert mask.segments is not None
    assert mask.segments.tolist() == [[-1, 0, 0, 0, -1]]


def test_padded_rows_have_finite_outputs_and_real_rows_ignore_padding():
    qkv = draw(1, 12, 2, 2, 8)
    real = jnp.asarray([[0] * 4 + [1] * 8], jnp.int32)
    (mask,) = make_masks("blocks", 12, 12, (real, None, None), [None], jnp.float32)
    y, alone = jax.jit(lambda *qkv: (attend(*qkv, mask), attend(*(x[:, 4:] for x in qkv), None)))(
        *qkv
    )
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[:, 4:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("expected", "attention", "platform", "changes"),
    [
        ("dense", "auto", "cpu", {}),
        ("blocks", "flash", "cpu", {}),
        ("cudnn", "auto", "gpu", {}),
        ("dense", "dense", "gpu", {}),
        ("dense", "auto", "gpu", {"cached": True}),
        ("blocks", "auto", "gpu", {"dtype": jnp.float32}),
        ("blocks", "auto", "gpu", {"soft_cap": 50.0}),
        ("blocks", "auto", "gpu", {"head_dim": 256}),
        ("blocks", "auto", "gpu", {"windows": 2}),
        ("dense", "auto", "gpu", {"windows": 2, "tokens": 64}),
        ("splash", "auto", "tpu", {}),
        ("splash", "auto", "tpu", {"soft_cap": 50.0, "dtype": jnp.float32}),
        ("blocks", "auto", "tpu", {"windows": 2}),
        ("dense", "auto", "tpu", {"tokens": 64}),
    ],
)
def test_the_kernel_is_what_the_target_supports(expected, attention, platform, changes):
    sizes = {"dtype": HALF, "head_dim": 128, "tokens": 4096} | changes
    assert choose_kernel(attention, platform, **sizes) == expected


def test_lengths_are_padded_to_a_multiple():
    x = jnp.ones((1, 3, 2, 2))
    assert pad_tokens(x, 1, 2).shape == (1, 4, 2, 2)
    assert pad_tokens(x, 1, 3) is x


def test_no_kernel_but_the_dense_one_gets_a_mask_of_all_pairs():
    segments = packed(1, 64)
    for kernel in (attention_mask.SPLASH, attention_mask.BLOCKS):
        (mask,) = make_masks(kernel, 64, 64, (None, segments, None), [None], HALF)
        assert max(leaf.size for leaf in jax.tree.leaves(mask)) == 64
