"""The algebra by itself: any chain of structural operations and a product equals the dense one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_lora import labels, lowrank
from jax_lora.labels import RANK
from jax_lora.lowrank import LowRank
from tests.lora_cases import random_tree

SIZES = (2, 3, 4)


def low_rank(sides: str, seed: int = 0, rank: int = 2) -> LowRank:
    """A value whose axis i is an input, an output or a stack axis as `sides[i]` says."""
    shape = tuple(SIZES[i % 3] for i in range(len(sides)))
    of = lambda wanted: tuple(i for i, side in enumerate(sides) if side in wanted)  # noqa: E731
    a_labels, b_labels = (*of("si"), RANK), (*of("s"), RANK, *of("o"))
    sizes = {**dict(enumerate(shape)), RANK: rank}
    a, b, w = random_tree(
        [tuple(sizes[x] for x in a_labels), tuple(sizes[x] for x in b_labels), shape], seed
    )
    labels_of_w = tuple(range(len(sides)))
    return LowRank(w, a, b, None, labels_of_w, a_labels, b_labels, 0.5, 0.0, "w")


def dense(value: LowRank) -> np.ndarray:
    """W0 + scale * a @ b in float64, by NumPy's einsum."""
    names = {}
    letter = lambda label: names.setdefault(label, "abcdefghijklmnop"[len(names)])  # noqa: E731
    a, b = ("".join(map(letter, each)) for each in (value.a_labels, value.b_labels))
    out = "".join(letter(label) for label in value.w_labels if label is not None)
    product = np.einsum(f"{a},{b}->{out}", np.float64(value.a), np.float64(value.b))
    return np.float64(value.w) + value.scale * product.reshape(value.shape)


@st.composite
def chains(draw: st.DrawFn) -> tuple[LowRank, np.ndarray]:
    """A value after a chain of operations, and the dense array after the same chain."""
    sides = draw(st.permutations(list("io" + draw(st.sampled_from(["", "s", "i", "so", "io"])))))
    value = low_rank("".join(sides), seed=draw(st.integers(0, 3)))
    array = dense(value)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(
            st.sampled_from(["transpose", "slice", "reverse", "reshape", "expand", "scale"])
        )
        changed, changed_array = _apply(draw, kind, value, array)
        if changed is not None and changed_array is not None:
            value, array = changed, changed_array
    return value, array


def _apply(draw, kind, value, array):
    axis = draw(st.integers(0, array.ndim - 1))
    if kind == "transpose":
        order = draw(st.permutations(range(array.ndim)))
        return lowrank.transpose(value, order), array.transpose(order)
    if kind == "slice":
        start = draw(st.integers(0, array.shape[axis] - 1))
        cut = lambda x, axis: lax.slice_in_dim(x, start, x.shape[axis], 1, axis)  # noqa: E731
        return lowrank.along_axis(value, axis, cut), np.take(
            array, range(start, array.shape[axis]), axis
        )
    if kind == "reverse":
        flip = lambda x, axis: lax.rev(x, [axis])  # noqa: E731
        return lowrank.along_axis(value, axis, flip), np.flip(array, axis)
    if kind == "expand":
        shape = (*array.shape[:axis], 1, *array.shape[axis:])
        kept = [i for i in range(len(shape)) if i != axis]
        return lowrank.expand(value, shape, kept), array.reshape(shape)
    if kind == "reshape" and axis + 1 < array.ndim:
        merged = (*array.shape[:axis], -1, *array.shape[axis + 2 :])
        shape = array.reshape(merged).shape
        return lowrank.reshape(value, shape), array.reshape(shape)
    if kind == "scale":
        vector = np.arange(1.0, array.shape[axis] + 1)
        spread = vector.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        w = value.w * jnp.asarray(spread, jnp.float32)
        other = jnp.asarray(vector, jnp.float32)
        if value.w_labels[axis] is None:
            return None, None
        return lowrank.multiply(value, w, other, [axis]), array * spread
    return None, None


@settings(max_examples=60)
@given(chains())
def test_structural_operations_carry_the_value(chain):
    value, array = chain
    assert value.shape == array.shape
    np.testing.assert_allclose(lowrank.materialize(value), array, rtol=2e-5, atol=2e-5)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.data())
def test_reshape_groups_pair_equal_sizes(old, data):
    new = data.draw(st.permutations(old))
    groups = labels.reshape_groups(old, new)
    assert groups is not None
    for before, after in groups:
        assert math.prod(old[i] for i in before) == math.prod(new[i] for i in after)


def test_a_reshape_that_mixes_sides_or_empties_an_axis_is_refused():
    assert lowrank.reshape(low_rank("io"), (6,)) is None
    assert labels.reshape_groups([0, 3], [3, 0]) is None
    assert labels.reshape_groups([4], [3]) is None


def test_labels_remember_where_they_came_from():
    merged = labels.merge_label([1, 2])
    first, second = labels.split_labels(merged, (2, 3))
    assert first != second
    assert labels.origins(first) == labels.origins(second) == {1, 2}
    assert labels.merge_label([4]) == 4 and labels.split_labels(4, (7,)) == (4,)
    assert labels.origins(None) == labels.origins(RANK) == frozenset()


def test_a_sum_of_bfloat16_products_is_rounded_once():
    value = low_rank("io", rank=2)
    half = value.replace(w=value.w.astype(jnp.bfloat16))
    want = dense(half.replace(w=half.w.astype(jnp.float32)))
    ulp = np.abs(want) * 2.0**-8
    assert (np.abs(np.float64(lowrank.materialize(half).astype(jnp.float32)) - want) <= ulp).all()


def test_a_row_is_no_matrix():
    value = low_rank("io")
    row = lowrank.along_axis(value, 0, lambda x, axis: lax.slice_in_dim(x, 0, 1, 1, axis))
    assert row is not None
    assert value.is_matrix and not lowrank.squeeze(row, [0]).is_matrix
    assert jax.tree.structure(value) == jax.tree.structure(low_rank("io", seed=3))
