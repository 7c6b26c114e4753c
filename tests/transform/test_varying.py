"""The mesh axes along which the data of a weight varies, determined from the jaxpr."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_lora.transform import vary

MESH = jax.make_mesh((2, 4), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
ROWS, COLUMNS = P("d"), P(None, "m")
SWAP = [(0, 1), (1, 0)]


def scan_over(x, w, length=2):
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=length)[0]


def rolled(x, w):
    """The first trip meets the same rows on every shard, the second does not."""
    start = jnp.ones_like(x, shape=(4, 8))
    return lax.scan(lambda h, _: (h @ w + x, None), start, None, length=2)[0]


def counted(x, w):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]


def in_another(x, w):
    inner = lambda x, w: jax.shard_map(  # noqa: E731
        jnp.matmul, in_specs=(P(None, "m"), P("m")), out_specs=P(), check_vma=False,
        axis_names={"m"},
    )(x, w)  # fmt: skip
    return inner(x, w)


# The body, how x and w are sharded, and the axes along which what meets w differs.
PROGRAMS = {
    "the same data": (lambda x, w: x @ w, P(), P(), ""),
    "rows of a batch": (lambda x, w: x @ w, ROWS, P(), "d"),
    "rows over two axes": (lambda x, w: x @ w, P(("d", "m")), P(), "d m"),
    "a kernel sharded by outputs": (lambda x, w: x @ w, P(), P(None, "m"), ""),
    "a kernel sharded by inputs": (lambda x, w: x @ w, P(None, "m"), P("m"), "m"),
    "both": (lambda x, w: x @ w, ROWS, P(None, "m"), "d"),
    "a sum": (lambda x, w: lax.psum(x, "d") @ w, ROWS, P(), ""),
    "a mean over one of two": (lambda x, w: lax.pmean(x, "d") @ w, P("d", "m"), P("m"), "m"),
    "a maximum": (lambda x, w: lax.pmax(x, "d") @ w, ROWS, P(), ""),
    "a gather": (lambda x, w: lax.all_gather(x, "d", tiled=True) @ w, ROWS, P(), ""),
    "a sum in groups": (
        lambda x, w: lax.psum(x, "m", axis_index_groups=[[0, 1], [2, 3]]) @ w, COLUMNS, P("m"), "m"),
    "a sum that is scattered": (
        lambda x, w: lax.psum_scatter(x, "d", tiled=True) @ w, P(), P(), "d"),
    "data of the neighbour": (lambda x, w: lax.ppermute(x, "d", SWAP) @ w, ROWS, P(), "d"),
    "a slice by the shard": (
        lambda x, w: lax.dynamic_slice_in_dim(x, 2 * lax.axis_index("d"), 2) @ w, P(), P(), "d"),
    "after a product": (lambda x, w: jax.nn.relu(x @ w) @ w, ROWS, P(), "d"),
    "different data, then the same": (
        lambda x, w: lax.psum(x @ w, "d") @ w, ROWS, P(), ""),
    "a transposed kernel": (lambda x, w: x @ (2 * w).T, ROWS, P(), "d"),
    "the kernel first": (lambda x, w: w.T @ x.T, ROWS, P(), "d"),
    "jit": (lambda x, w: jax.jit(jnp.matmul)(x, w), ROWS, P(), "d"),
    "remat": (lambda x, w: jax.checkpoint(jnp.matmul)(x, w), ROWS, P(), "d"),
    "a sum in jit": (lambda x, w: jax.jit(lambda x: lax.psum(x, "d"))(x) @ w, ROWS, P(), ""),
    "scan": (scan_over, ROWS, P(), "d"),
    "scan that starts the same": (rolled, ROWS, P(), "d"),
    "while": (counted, ROWS, P(), "d"),
    "cond": (lambda x, w: lax.cond(True, lambda: x @ w, lambda: x), ROWS, P(), "d"),
    "a table, tied": (lambda x, w: w[x[:, 0].astype(int)] @ w.T, ROWS, P(), "d"),
    "a table, looked up": (lambda x, w: w[x[:, 0].astype(int)], ROWS, P(), ""),
    "a chosen expert": (
        lambda x, w: x[:, :4] @ w.reshape(2, 4, 8)[jnp.array([1])][0], ROWS, P(), "d"),
    "a sum of two, one the same already": (
        lambda x, w: lax.psum((x, w), "m")[0] @ w, P("d", "m"), P("m"), "d"),
    "beside different data": (
        lambda x, w: lax.optimization_barrier((jnp.ones((4, 8)), x))[0] @ w, ROWS, P(), ""),
    "no product": (lambda x, w: x + w.sum(), ROWS, P(), ""),
    "another shard_map": (in_another, ROWS, P(), "d"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_axes_of_data(name):
    fn, x_spec, w_spec, expected = PROGRAMS[name]
    mapped = jax.shard_map(
        fn, mesh=MESH, in_specs=(x_spec, w_spec), out_specs=P("d"), check_vma=False,
        axis_names={"d"} if fn is in_another else {"d", "m"},
    )  # fmt: skip
    (eqn,) = jax.make_jaxpr(mapped)(jnp.ones((8, 8)), jnp.ones((8, 8))).jaxpr.eqns
    jaxpr, specs = eqn.params["jaxpr"], eqn.params["in_specs"]  # constants, x, w
    asked = [index == len(specs) - 1 for index in range(len(specs))]
    *others, met = vary.axes_of_data(
        getattr(jaxpr, "jaxpr", jaxpr), [vary.axes_of(spec) for spec in specs], asked
    )
    assert met == frozenset(expected.split())
    assert not any(others)
