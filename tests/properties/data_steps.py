"""Steps of data alone: what lies between one use of a weight and the next."""

from __future__ import annotations

from tests.properties.drawing import Draw, Scope, small, step


@step("data", 3)
def bend(draw: Draw, scope: Scope):
    x = draw.data(scope)
    along = ("jax.nn.softmax({})", "jnp.cumsum({}, axis=0)", "jnp.flip({}, 0)") if x.shape else ()
    expression = draw.rng.choice(
        ("jnp.tanh({})", "jnp.sin({})", "jax.nn.silu({})", "sine_with_own_jvp({})",
         "jnp.exp(-{} ** 2)", "0.5 * {}", "lax.stop_gradient({})", *along)
    )  # fmt: skip
    return draw.make(scope, expression.format(x.name), x.shape)


@step("data", 2)
def join(draw: Draw, scope: Scope):
    x, y = draw.data(scope), draw.data(scope)
    operation = draw.rng.choice("+-*")
    return draw.make(scope, f"{x.name} {operation} fit({y.name}, {x.shape})", x.shape)


@step("data", 2)
def move(draw: Draw, scope: Scope):
    x = draw.data(scope)
    order = tuple(draw.shuffled(range(len(x.shape))))
    shape = tuple(x.shape[axis] for axis in order)
    return draw.make(scope, f"jnp.transpose({x.name}, {order})", shape)


@step("data", 1.5)
def shrink(draw: Draw, scope: Scope):
    x = draw.data(scope)
    if not x.shape:
        return None
    axis = draw.rng.randrange(len(x.shape))
    operation = draw.rng.choice(("sum", "mean"))
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return draw.make(scope, f"{x.name}.{operation}(axis={axis})", shape)


@step("data", 1.5)
def another_shape(draw: Draw, scope: Scope):
    shape = draw.shape(3)
    if not small(shape):
        return None
    return draw.make(scope, f"fit({draw.data(scope).name}, {shape})", shape)
