"""Any chain of structural operations and a product equals the dense computation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_lora.algebra import low_rank as low_rank_values
from jax_lora.algebra import moves, named_axes
from jax_lora.algebra.low_rank import LowRank
from jax_lora.algebra.moves import Move, along_axis, drop, multiply, regroup
from jax_lora.algebra.named_array import NamedArray
from jax_lora.algebra.named_axes import RANK
from tests.lora_cases import random_tree

SIZES = (2, 3, 4)


def low_rank(sides: str, seed: int = 0, rank: int = 2) -> LowRank:
    """A value whose axis i is an input, an output or a stack axis as `sides[i]` says."""
    shape = tuple(SIZES[i % 3] for i in range(len(sides)))
    of = lambda wanted: tuple(i for i, side in enumerate(sides) if side in wanted)  # noqa: E731
    a_axes, b_axes = (*of("si"), RANK), (*of("s"), RANK, *of("o"))
    sizes = {**dict(enumerate(shape)), RANK: rank}
    a, b, w = random_tree(
        [tuple(sizes[x] for x in a_axes), tuple(sizes[x] for x in b_axes), shape], seed
    )
    axes = tuple(range(len(sides)))
    return LowRank(w, axes, "w", NamedArray(a, a_axes), NamedArray(b, b_axes), 0.5)


def dense(value: LowRank) -> np.ndarray:
    """W0 + scale * a @ b in float64, by NumPy's einsum."""
    names = {}
    letter = lambda label: names.setdefault(label, "abcdefghijklmnop"[len(names)])  # noqa: E731
    a, b = ("".join(map(letter, each.axes)) for each in (value.a, value.b))
    out = "".join(letter(name) for name in value.axes if name is not None)
    product = np.einsum(f"{a},{b}->{out}", np.float64(value.a.array), np.float64(value.b.array))
    return np.float64(value.base) + value.scale * product.reshape(value.shape)


def after(value: LowRank, move: Move, base) -> LowRank | None:
    """A value after a move, with W0 as the operation left it."""
    changed = moves.apply_move(value, move)
    return None if changed is None else changed.replace(base=base)


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
    moved = lambda axes, *steps: lambda base: after(value, Move(axes, steps), base)  # noqa: E731
    if kind == "transpose":
        order = draw(st.permutations(range(array.ndim)))
        axes = tuple(value.axes[i] for i in order)
        return moved(axes)(value.base.transpose(order)), array.transpose(order)
    if kind == "slice":
        start = draw(st.integers(0, array.shape[axis] - 1))
        cut = lambda x, axis: lax.slice_in_dim(x, start, x.shape[axis], 1, axis)  # noqa: E731
        return moved(value.axes, along_axis(value.axes[axis], cut))(cut(value.base, axis)), np.take(
            array, range(start, array.shape[axis]), axis
        )
    if kind == "reverse":
        flip = lambda x, axis: lax.rev(x, [axis])  # noqa: E731
        step = along_axis(value.axes[axis], flip)
        return moved(value.axes, step)(flip(value.base, axis)), np.flip(array, axis)
    if kind == "expand":
        axes = (*value.axes[:axis], None, *value.axes[axis:])
        shape = (*array.shape[:axis], 1, *array.shape[axis:])
        return moved(axes)(value.base.reshape(shape)), array.reshape(shape)
    if kind == "reshape" and axis + 1 < array.ndim:
        if 1 in array.shape[axis : axis + 2]:
            return None, None  # axes of size 1 are dropped, which is a step of its own
        old, size = value.axes[axis : axis + 2], math.prod(array.shape[axis : axis + 2])
        new = named_axes.merge_names(old)
        shape = (*array.shape[:axis], size, *array.shape[axis + 2 :])
        step = regroup(old, (new,), (size,))
        axes = (*value.axes[:axis], new, *value.axes[axis + 2 :])
        return moved(axes, step)(value.base.reshape(shape)), array.reshape(shape)
    if kind == "scale":
        vector = np.arange(1.0, array.shape[axis] + 1)
        spread = vector.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        if value.axes[axis] is None:
            return None, None
        other = NamedArray(jnp.asarray(vector, jnp.float32), (value.axes[axis],))
        base = value.base * jnp.asarray(spread, jnp.float32)
        return moved(value.axes, multiply(lambda: other))(base), array * spread
    return None, None


@settings(max_examples=30)
@given(chains())
def test_structural_operations_carry_the_value(chain):
    value, array = chain
    assert value.shape == array.shape
    np.testing.assert_allclose(low_rank_values.materialize(value), array, rtol=2e-5, atol=2e-5)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.data())
def test_reshape_groups_pair_equal_sizes(old, data):
    new = data.draw(st.permutations(old))
    groups = named_axes.reshape_groups(old, new)
    assert groups is not None
    for before, after in groups:
        assert math.prod(old[i] for i in before) == math.prod(new[i] for i in after)


def test_a_reshape_that_mixes_sides_or_empties_an_axis_is_refused():
    value = low_rank("io")
    mixed = Move((named_axes.Merged((0, 1)),), (regroup((0, 1), ("m",), (6,)),))
    assert after(value, mixed, value.base) is None
    assert named_axes.reshape_groups([0, 3], [3, 0]) is None
    assert named_axes.reshape_groups([4], [3]) is None
    assert named_axes.reshape_groups([], [3]) is None
    assert named_axes.reshape_groups([], []) == []


def test_names_remember_where_they_came_from():
    merged = named_axes.merge_names([1, 2])
    first, second = named_axes.split_name(merged, (2, 3))
    assert first != second
    assert named_axes.origins(first) == named_axes.origins(second) == {1, 2}
    assert named_axes.origins(named_axes.Index(first, 0)) == {1, 2}
    assert named_axes.merge_names([4]) == 4 and named_axes.split_name(4, (7,)) == (4,)
    assert named_axes.origins(None) == named_axes.origins(RANK) == frozenset()


def test_a_sum_of_bfloat16_products_is_rounded_once():
    value = low_rank("io", rank=2)
    half = value.replace(base=value.base.astype(jnp.bfloat16))
    want = dense(half.replace(base=half.base.astype(jnp.float32)))
    ulp = np.abs(want) * 2.0**-8
    assert (
        np.abs(np.float64(low_rank_values.materialize(half).astype(jnp.float32)) - want) <= ulp
    ).all()


def test_a_row_is_no_matrix():
    value = low_rank("io")
    first = lambda x, axis: lax.slice_in_dim(x, 0, 1, 1, axis)  # noqa: E731
    steps = (along_axis(0, first), drop((0,)))
    row = after(value, Move((1,), steps), value.base[0])
    assert row is not None
    assert value.is_matrix and not row.is_matrix
    assert jax.tree.structure(value) == jax.tree.structure(low_rank("io", seed=3))
