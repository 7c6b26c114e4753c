"""Steps that hold a program: scans, branches, remat, jit, vmap, loops and derivatives inside."""

from __future__ import annotations

from tests.properties.drawing import Draw, Scope, small, step
from tests.properties.programs import Block, Line, Var


def _stacks(draw: Draw, scope: Scope, axis: int = 0) -> tuple[int, list[Var]]:
    """Weights that share their leading axis, to be scanned or mapped over together."""
    first = draw.weight(scope, least=2)
    if first is None:
        return draw.size(), []
    length = first.shape[axis]
    others = [w for w in scope.weights if len(w.shape) > 1 and w.shape[0] == length and w != first]
    return length, [first, *draw.rng.sample(others, min(len(others), draw.rng.choice((0, 0, 1))))]


def _slice(draw: Draw, var: Var, axis: int = 0) -> Var:
    return Var(draw.name("s"), (*var.shape[:axis], *var.shape[axis + 1 :]))


@step("block", 4)
def scan(draw: Draw, scope: Scope):
    """Scan over stacked weights, data, both or neither, with weights carried along at times."""
    length, stacks = _stacks(draw, scope)
    if draw.chance(0.25):
        length, stacks = draw.rng.randint(1, 3), []
    if draw.chance(0.3) and stacks:  # the stack is not the first axis of the leaf itself
        w = draw.weight(scope, least=2)
        axis = draw.rng.randrange(len(w.shape))
        shape = (w.shape[axis], *w.shape[:axis], *w.shape[axis + 1 :])
        stacks = [draw.make_weight(scope, f"jnp.moveaxis({w.name}, {axis}, 0)", shape)]
        length = w.shape[axis]
    rows = []
    if draw.chance(0.4):
        shape = (length, *draw.shape(2))
        rows = [draw.make(scope, f"fit({draw.data(scope).name}, {shape})", shape)]
    layers, each_row = [_slice(draw, var) for var in stacks], [_slice(draw, var) for var in rows]
    start = draw.data(scope)
    h = Var(draw.name("h"), start.shape)
    weight = draw.weight(scope) if draw.chance(0.2) else None
    carried = [Var(draw.name("k"), weight.shape)] if weight else []
    change = draw.rng.choice(("{}", "{}", "0.5 * {}"))
    ys = [draw.shape(2)] if draw.chance(0.4) else []
    body = draw.block(
        scope, [h, *each_row], [*layers, *carried], want=[h.shape, *ys], wrap="jnp.tanh({})"
    )
    xs = _tuple([var.name for var in (*layers, *each_row)])
    new_h, *outs = body.results
    keeps = [change.format(var.name) for var in carried]
    stacked = [*outs, *[var.name for var in layers if draw.chance(0.1)]]
    packed = Block(
        body.name,
        (Var("carry", ()), Var("xs", ())),
        (
            _unpack([h, *carried], "carry"),
            *([_unpack([*layers, *each_row], "xs")] if xs else []),
            *body.lines,
        ),
        (_tuple([new_h, *keeps]), _tuple(stacked) or "None"),
    )
    options = draw.rng.choice(("", "", ", reverse=True", ", unroll=2"))
    given = _tuple([var.name for var in (*stacks, *rows)]) or "None"
    initial = _tuple([start.name, *([weight.name] if weight else [])])
    call = f"lax.scan({body.name}, {initial}, {given}, length={length}{options})"
    var, out = Var(draw.name("v"), start.shape), None
    if ys and small((length, *ys[0])):
        out = Var(draw.name("v"), (length, *ys[0]))
        packed_call = f"(lambda r: (r[0][0], r[1][0]))({call})"
        scope.write(Line((var, out), packed_call, (packed,)))
        draw.keep(scope, out)
    else:
        scope.write(Line((var,), f"{call}[0][0]", (packed,)))
    draw.keep(scope, var)
    return True


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)},)" if names else ""


def _unpack(variables: list[Var], source: str) -> Line:
    # The comma keeps a tuple of one a tuple.
    return Line(tuple(variables), f"{source}" if len(variables) > 1 else f"{source}[0]")


@step("block", 1)
def loop(draw: Draw, scope: Scope):
    """A loop of so many rounds; written with `while_loop`, it has no reverse mode."""
    start = draw.data(scope)
    h = Var(draw.name("h"), start.shape)
    rounds = draw.rng.randint(1, 3)
    body = draw.block(scope, [h], [], want=[h.shape], wrap="jnp.tanh({})", single=True)
    if draw.forward and (not draw.reverse or draw.chance(0.3)):
        draw.reverse = False
        weight = draw.weight(scope) if draw.chance(0.4) else None
        kept = (f", {weight.name}", ", s[2]") if weight else ("", "")
        again = f"lambda s: (s[0] + 1, {body.name}(s[1]){kept[1]})"
        state = f"(0, {start.name}{kept[0]})"
        call = f"lax.while_loop(lambda s: s[0] < {rounds}, {again}, {state})[1]"
    else:
        call = f"lax.fori_loop(0, {rounds}, lambda _, h: {body.name}(h), {start.name})"
    return draw.make(scope, call, start.shape, (body,))


@step("block", 2.5)
def branch(draw: Draw, scope: Scope):
    x, w = draw.data(scope), draw.weight(scope)
    weights = [w] if w is not None and draw.chance(0.7) else []
    shape, count = draw.shape(2), draw.rng.randint(2, 3)
    bodies = []
    for _ in range(count):
        d = Var(draw.name("d"), x.shape)
        inside = [Var(draw.name("w"), each.shape) for each in weights]
        bodies.append(draw.block(scope, [d], inside, want=[shape], single=True))
    operands = ", ".join(var.name for var in (x, *weights))
    if count == 2:
        call = f"lax.cond({draw.position(2)} > 0, {bodies[0].name}, {bodies[1].name}, {operands})"
    else:
        names = ", ".join(body.name for body in bodies)
        call = f"lax.switch({draw.position(3)}, [{names}], {operands})"
    return draw.make(scope, call, shape, tuple(bodies))


@step("block", 3)
def call(draw: Draw, scope: Scope):
    """jit, remat under some policy, jit called twice, and derivatives of a function inside."""
    x, w = draw.data(scope), draw.weight(scope)
    weights = [w] if w is not None and draw.chance(0.6) else []
    d, inside = Var(draw.name("d"), x.shape), [Var(draw.name("w"), each.shape) for each in weights]
    shape = x.shape if draw.chance(0.4) else draw.shape(2)
    body = draw.block(scope, [d], inside, want=[shape], single=True)
    operands = ", ".join(var.name for var in (x, *weights))
    policy = draw.rng.choice(
        ("nothing_saveable", "dots_saveable", "everything_saveable",
         "dots_with_no_batch_dims_saveable", 'save_only_these_names("kept")')
    )  # fmt: skip
    kinds = [f"jax.jit({body.name})({operands})", f"jax.checkpoint({body.name})({operands})",
             f"jax.checkpoint({body.name}, policy=policies.{policy})({operands})"]  # fmt: skip
    if shape == x.shape:
        rest = "".join(f", {each.name}" for each in weights)
        kinds += [f"jax.jit({body.name})(jax.jit({body.name})({operands}){rest})"] * 2
    return draw.make(scope, draw.rng.choice(kinds), shape, (body,))


@step("block", 2)
def derivative(draw: Draw, scope: Scope):
    """A derivative inside the program: with respect to data, or to a weight itself."""
    if not (draw.forward and draw.reverse):
        return None
    x, w, length = draw.data(scope), draw.weight(scope, most=3), draw.size()
    weights = [w] if w is not None and draw.chance(0.5) else []
    d, inside = Var(draw.name("d"), x.shape), [Var(draw.name("w"), each.shape) for each in weights]
    body = draw.block(scope, [d], inside, want=[(length,)], single=True)
    if any("while_loop" in row or "own_vjp" in row for row in body.source()):
        return None
    operands = ", ".join(var.name for var in (x, *weights))
    of_data = f"lambda d: {body.name}({', '.join(['d', *(each.name for each in weights)])})"
    loss = f"lambda *args: ({body.name}(*args) ** 2).sum()"
    kinds = [
        (x.shape, f"jax.grad({loss})({operands})"),
        (x.shape, f"jax.grad({loss})({operands})"),
        ((length,), f"jax.jvp({of_data}, ({x.name},), (jnp.cos({x.name}),))[1]"),
        ((length, *x.shape), f"jax.jacrev({body.name})({operands})"),
        ((length, *x.shape), f"jax.jacfwd({body.name})({operands})"),
    ]
    if weights:
        kinds.append((w.shape, f"jax.grad({loss}, argnums=1)({operands})"))
    shape, expression = draw.rng.choice(kinds)
    return draw.make(scope, expression, shape, (body,)) if small(shape) else None


@step("block", 3)
def mapped(draw: Draw, scope: Scope):
    """vmap over data, over a weight, or over both, with any axes in and out."""
    w = draw.weight(scope, least=2)
    over_weight = w is not None and draw.chance(0.5)
    over_data = not over_weight or draw.chance(0.5)
    w_axis = draw.rng.randrange(len(w.shape)) if over_weight else None
    length = w.shape[w_axis] if over_weight else draw.size()
    if over_data:
        inner = list(draw.shape(2))
        x_axis = draw.rng.randint(0, len(inner))
        shape = (*inner[:x_axis], length, *inner[x_axis:])
        x = draw.make(scope, f"fit({draw.data(scope).name}, {shape})", shape)
        d = Var(draw.name("d"), tuple(inner))
    else:
        x, x_axis = draw.data(scope), None
        d = Var(draw.name("d"), x.shape)
    weights = [w] if w is not None and (over_weight or draw.chance(0.4)) else []
    inside = [
        _slice(draw, w, w_axis) if over_weight else Var(draw.name("w"), w.shape) for _ in weights
    ]
    want = draw.shape(2)
    if not small((length, *want)):
        return None
    body = draw.block(scope, [d], inside, want=[want], single=True)
    axes = (x_axis, *([w_axis] if weights else []))
    out = draw.rng.randint(0, len(want))
    operands = ", ".join(var.name for var in (x, *weights))
    call = f"jax.vmap({body.name}, in_axes={axes}, out_axes={out})({operands})"
    return draw.make(scope, call, (*want[:out], length, *want[out:]), (body,))
