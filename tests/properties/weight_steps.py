"""Steps that make a weight of a weight: what the structure should survive, and what it cannot."""

from __future__ import annotations

import math

from tests.properties.drawing import Draw, Scope, small, step
from tests.properties.programs import Block, Shape, Var


def _replaced(shape: Shape, axis: int, *sizes: int) -> Shape:
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


@step("weight", 3)
def transpose(draw: Draw, scope: Scope):
    w = draw.weight(scope, least=2)
    if w is None:
        return None
    order = draw.shuffled(range(len(w.shape)))
    if order == list(reversed(range(len(w.shape)))):
        return draw.make_weight(scope, f"{w.name}.T", w.shape[::-1])
    shape = tuple(w.shape[axis] for axis in order)
    return draw.make_weight(scope, f"jnp.transpose({w.name}, {tuple(order)})", shape)


@step("weight", 3)
def merge_axes(draw: Draw, scope: Scope):
    w = draw.weight(scope, least=2)
    if w is None:
        return None
    start = draw.rng.randrange(len(w.shape) - 1)
    stop = draw.rng.randint(start + 2, len(w.shape))
    shape = (*w.shape[:start], math.prod(w.shape[start:stop]), *w.shape[stop:])
    return draw.make_weight(scope, f"{w.name}.reshape{_written(shape)}", shape)


def _written(shape: Shape) -> str:
    return f"({shape[0]},)" if len(shape) == 1 else str(tuple(shape))


@step("weight", 3)
def cut_axis(draw: Draw, scope: Scope):
    w = draw.weight(scope, most=4)
    axes = [axis for axis, size in enumerate(w.shape) if size > 1] if w else []
    if w is None or not axes:
        return None
    axis = draw.rng.choice(axes)
    size = w.shape[axis]
    first = draw.rng.choice([d for d in range(1, size + 1) if size % d == 0])
    shape = _replaced(w.shape, axis, first, size // first)
    return draw.make_weight(scope, f"{w.name}.reshape{_written(shape)}", shape)


@step("weight", 1.5)
def any_reshape(draw: Draw, scope: Scope):
    w = draw.weight(scope)
    if w is None:
        return None
    rest, shape = math.prod(w.shape), []
    while rest > 1 and len(shape) < 4:
        shape.append(draw.rng.choice([d for d in range(1, rest + 1) if rest % d == 0]))
        rest //= shape[-1]
    shape = tuple([*shape, rest] if rest > 1 or not shape else shape)
    return draw.make_weight(scope, f"{w.name}.reshape{_written(shape)}", shape)


@step("weight", 2)
def regroup(draw: Draw, scope: Scope):
    """Merge axes of one side, in an order of their own: heads out of their kernel's order."""
    own = [var for var in scope.weights if var.name in draw.kernels]
    groups = [
        (var, axes)
        for var in own
        for axes in draw.kernels[var.name].sides()
        if math.prod(var.shape[axis] > 1 for axis in axes) and len(axes) > 1
    ]
    if not groups:
        return None
    w, axes = draw.rng.choice(groups)
    rest = [axis for axis in range(len(w.shape)) if axis not in axes]
    place = draw.rng.randint(0, len(rest))
    order = (*rest[:place], *draw.shuffled(axes), *rest[place:])
    merged = math.prod(w.shape[axis] for axis in axes)
    sizes = [w.shape[axis] for axis in rest]
    shape = (*sizes[:place], merged, *sizes[place:])
    regrouped = f"jnp.transpose({w.name}, {order}).reshape{_written(shape)}"
    return draw.make_weight(scope, regrouped, shape)


@step("weight", 1)
def unit_axis(draw: Draw, scope: Scope):
    w = draw.weight(scope, most=4)
    if w is None:
        return None
    axis = draw.rng.randint(0, len(w.shape))
    shape = (*w.shape[:axis], 1, *w.shape[axis:])
    return draw.make_weight(scope, f"jnp.expand_dims({w.name}, {axis})", shape)


@step("weight", 1)
def drop_unit_axis(draw: Draw, scope: Scope):
    w = draw.weight(scope, least=2)
    axes = [axis for axis, size in enumerate(w.shape) if size == 1] if w else []
    if w is None or not axes:
        return None
    axis = draw.rng.choice(axes)
    return draw.make_weight(scope, f"jnp.squeeze({w.name}, {axis})", _replaced(w.shape, axis))


@step("weight", 3)
def cut_out(draw: Draw, scope: Scope):
    """Slice one axis, with a stride or without, or backwards."""
    w = draw.weight(scope)
    if w is None:
        return None
    axis = draw.rng.randrange(len(w.shape))
    size = w.shape[axis]
    start = draw.rng.randrange(size)
    stop = draw.rng.randint(start + 1, size)
    stride = draw.rng.choice((1, 1, 2))
    left = len(range(start, stop, stride))
    before = ":, " * axis
    return draw.make_weight(
        scope, f"{w.name}[{before}{start}:{stop}:{stride}]", _replaced(w.shape, axis, left)
    )


@step("weight", 2)
def index(draw: Draw, scope: Scope):
    """Take one position: one written down, or one known only when the program runs."""
    w = draw.weight(scope, least=2)
    if w is None:
        return None
    axis = draw.rng.randrange(len(w.shape))
    size = w.shape[axis]
    shape = _replaced(w.shape, axis)
    if draw.chance(0.5):
        position = str(draw.rng.randrange(-size, size))
    else:
        position = draw.position(size)
    if draw.chance(0.3):
        call = f"lax.dynamic_index_in_dim({w.name}, {position}, {axis}, keepdims=False)"
        return draw.make_weight(scope, call, shape)
    return draw.make_weight(scope, f"{w.name}[{':, ' * axis}{position}]", shape)


@step("weight", 1.5)
def dynamic_slice(draw: Draw, scope: Scope):
    w = draw.weight(scope)
    if w is None:
        return None
    axis = draw.rng.randrange(len(w.shape))
    size = draw.rng.randint(1, w.shape[axis])
    start = draw.start(w.shape[axis])  # JAX moves a slice that reaches over an end
    return draw.make_weight(
        scope,
        f"lax.dynamic_slice_in_dim({w.name}, {start}, {size}, {axis})",
        _replaced(w.shape, axis, size),
    )


@step("weight", 1)
def reverse(draw: Draw, scope: Scope):
    w = draw.weight(scope)
    if w is None:
        return None
    axes = draw.rng.sample(range(len(w.shape)), draw.rng.randint(1, min(2, len(w.shape))))
    return draw.make_weight(scope, f"jnp.flip({w.name}, {tuple(axes)})", w.shape)


@step("weight", 1)
def split(draw: Draw, scope: Scope):
    w = draw.weight(scope)
    axes = [axis for axis, size in enumerate(w.shape) if size > 1] if w else []
    if w is None or not axes:
        return None
    axis = draw.rng.choice(axes)
    at = draw.rng.randint(1, w.shape[axis] - 1)
    part = draw.rng.randrange(2)
    size = at if part == 0 else w.shape[axis] - at
    return draw.make_weight(
        scope, f"jnp.split({w.name}, [{at}], axis={axis})[{part}]", _replaced(w.shape, axis, size)
    )


@step("weight", 2)
def choose(draw: Draw, scope: Scope):
    """Take several positions of one axis by an array: layers of a stack, rows of a table."""
    w = draw.weight(scope, most=4)
    if w is None:
        return None
    axis = draw.rng.randrange(len(w.shape))
    size = w.shape[axis]
    ids = draw.shape(2) if draw.chance(0.8) else ()
    shape = _replaced(w.shape, axis, *ids)
    if not small(shape):
        return None
    positions, mode = _positions(draw, size, ids)
    return draw.make_weight(scope, f"jnp.take({w.name}, {positions}, axis={axis}{mode})", shape)


def _positions(draw: Draw, size: int, shape: Shape) -> tuple[str, str]:
    count = math.prod(shape)
    kind = draw.rng.choice(("within", "clip", "wrap", "fill"))
    least, most = (0, size - 1) if kind == "within" else (-1, size + 1)
    ids = [draw.rng.randint(least, most) for _ in range(count)]
    written = f"jnp.array({ids}).reshape({shape})"
    if draw.chance(0.3):
        written = f"({written} + {draw.position(2)})"
        kind = "clip" if kind == "within" else kind
    mode = {"within": "", "fill": ', mode="fill", fill_value=0'}
    return written, mode.get(kind, f', mode="{kind}"')


# -----------------------------------------------------------------------------------------------
# Other numbers
# -----------------------------------------------------------------------------------------------


@step("weight", 1)
def scale(draw: Draw, scope: Scope):
    w = draw.weight(scope)
    if w is None:
        return None
    number = f"fit({draw.data(scope).name}, ())"
    expression = draw.rng.choice(
        (f"{w.name} * 0.5", f"-2.0 * {w.name}", f"{w.name} / 3.0", f"-{w.name}",
         f"{w.name} * {number}", f"{w.name} / (2.0 + {number} ** 2)")
    )  # fmt: skip
    return draw.make_weight(scope, expression, w.shape)


@step("weight", 1.5)
def scale_along_axes(draw: Draw, scope: Scope):
    w = draw.weight(scope)
    if w is None:
        return None
    shape = tuple(size if draw.chance(0.4) else 1 for size in w.shape)
    other = f"fit({draw.data(scope).name}, {shape})"
    expression = draw.rng.choice(
        (f"{w.name} * {other}", f"{other} * {w.name}", f"{w.name} / (2.0 + {other} ** 2)")
    )
    return draw.make_weight(scope, expression, w.shape)


@step("weight", 1)
def add(draw: Draw, scope: Scope):
    w = draw.weight(scope)
    if w is None:
        return None
    shape = tuple(size if draw.chance(0.7) else 1 for size in w.shape)
    other = f"fit({draw.data(scope).name}, {shape})"
    expression = draw.rng.choice(
        (f"{w.name} + {other}", f"{other} + {w.name}", f"{other} - {w.name}",
         f"{w.name} - {other}", f"{w.name} - 1.0", f"2.0 - {w.name}")
    )  # fmt: skip
    return draw.make_weight(scope, expression, w.shape)


@step("weight", 1.5)
def the_same(draw: Draw, scope: Scope):
    """Operations that leave the numbers alone."""
    w = draw.weight(scope)
    if w is None:
        return None
    casts = [f"{w.name}.astype(LOW).astype(HIGH)"] if draw.lowered else []
    expression = draw.rng.choice(
        (f"lax.stop_gradient({w.name})", f"lax.optimization_barrier({w.name})",
         f'checkpoint_name({w.name}, "kept")', f"jnp.array({w.name}, copy=True)",
         f"jax.jit(lambda w: -w.T)({w.name}).T", f"jax.checkpoint(lambda w: w + 1.0)({w.name})",
         *casts, *casts)
    )  # fmt: skip
    return draw.make_weight(scope, expression, w.shape)


@step("weight", 0.6)
def no_rule(draw: Draw, scope: Scope):
    """Operations that lose the structure: the full weight is formed, and must be right."""
    w = draw.weight(scope, most=4)
    if w is None:
        return None
    n, x = w.name, f"fit({draw.data(scope).name}, {w.shape})"
    sure = f"fit({draw.rng.choice(draw.inputs).name}, {w.shape})"
    shape, expression = draw.rng.choice(
        (
            (w.shape, f"jnp.tanh({n})"),
            (w.shape, f"{n} * {x}"),
            (w.shape, f"jnp.where({sure} > 0, {n}, {x})"),
            (w.shape, f"jnp.cumsum({n}, axis=-1)"),
            (w.shape, f"{n} + 0.5 * {n}"),
            (w.shape, f"{n} / (1.0 + jnp.abs({n}))"),
            ((*w.shape[:-1], 2 * w.shape[-1]), f"jnp.concatenate([{n}, {x}], axis=-1)"),
            ((w.shape[0] + 1, *w.shape[1:]), f"jnp.pad({n}, [(0, 1)] + [(0, 0)] * ({n}.ndim - 1))"),
            ((2, *w.shape), f"jnp.broadcast_to({n}, {(2, *w.shape)})"),
            ((2, *w.shape), f"jnp.stack([{n}, {x}])"),
            (w.shape, f"{n}.at[0].set(1.0)"),
        )
    )
    return draw.make_weight(scope, expression, shape)


@step("weight", 0.7)
def out_of_a_program(draw: Draw, scope: Scope):
    """Weights that come out of a branch, a jit or a remat."""
    w = draw.weight(scope, most=4)
    if w is None:
        return None
    var = Var(draw.name("w"), w.shape)
    inner = Scope(scope.data, [var], depth=2)
    before = len(inner.lines)
    for _ in range(2):
        draw.rng.choice((transpose, merge_axes, cut_out, scale, index, reverse))(draw, inner)
    if len(inner.lines) == before:
        return None
    last = inner.weights[-1]
    body = Block(draw.name("body"), (var,), tuple(inner.lines), (last.name,), single=True)
    call = draw.rng.choice(("jax.jit({0})({1})", "jax.checkpoint({0})({1})", "{0}({1})",
                            f"lax.cond({draw.position(2)} > 0, {{0}}, lambda w: 2.0 * {{0}}(w), {{1}})"))  # fmt: skip  # noqa: E501
    return draw.make_weight(scope, call.format(body.name, w.name), last.shape, blocks=(body,))
