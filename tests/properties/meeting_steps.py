"""Steps in which a weight meets data: contractions of every shape, lookups, convolutions."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from tests.properties.drawing import Draw, Scope, small, step
from tests.properties.programs import Shape, Var


@step("meet", 14)
def contraction(draw: Draw, scope: Scope):
    draw.prepare(scope)
    w = draw.weight(scope)
    if w is None:
        return None
    return _contract(draw, scope, w, draw.data(scope))


@step("meet", 5)
def one_input_for_several(draw: Draw, scope: Scope):
    """Query, key and value: several weights meet the very same data."""
    first = draw.weight(scope, least=2)
    if first is None:
        return None
    met = list(draw.rng.choice(draw.sides(first)[:2])) if draw.chance(0.6) else []
    if not met:
        met = draw.rng.sample(range(len(first.shape)), draw.rng.randint(1, len(first.shape) - 1))
    sizes = [first.shape[axis] for axis in met]
    shape = tuple(draw.shuffled([*sizes, *(draw.size() for _ in range(draw.rng.randint(0, 2)))]))
    places = _match(draw, shape, sizes)
    if places is None or not small(shape):
        return None
    x = draw.make(scope, f"fit({draw.data(scope).name}, {shape})", shape)
    written = bool(_meet(draw, scope, first, x, dict(zip(met, places, strict=True))))
    for w in draw.shuffled(scope.weights)[:5]:
        if draw.chance(0.2):  # a kernel that is prepared between one product and the next
            draw.steps(scope, 1, ("weight",))
            w = scope.weights[-1]
        axes = _one_side(draw, w, sizes) or _match(draw, w.shape, sizes)
        if axes is not None and written < 4:
            written += bool(_meet(draw, scope, w, x, dict(zip(axes, places, strict=True))))
    return written


def _one_side(draw: Draw, w: Var, sizes: Sequence[int]) -> list[int] | None:
    """Find axes of these sizes that are all of a weight's inputs, or all of its outputs."""
    for side in draw.sides(w)[:2]:
        if sorted(w.shape[axis] for axis in side) == sorted(sizes):
            found = _match(draw, tuple(w.shape[axis] for axis in side), sizes)
            return None if found is None else [side[place] for place in found]
    return None


def _meet(draw: Draw, scope: Scope, w: Var, x: Var, pairs: dict[int, int]):
    roles = ["c" if axis in pairs else "f" for axis in range(len(w.shape))]
    if len(pairs) > 1 and draw.chance(0.1):
        roles[draw.rng.choice(list(pairs))] = "b"
    return draw.rng.choice(_SPELLINGS)(draw, scope, w, x, roles, pairs)


def _contract(draw: Draw, scope: Scope, w: Var, x: Var):
    roles = draw.rng.choices("cbf", weights=(5, 2, 4), k=len(w.shape))
    if draw.chance(0.3) and any(draw.sides(w)):  # as a model does: a sum over one side
        letters = draw.rng.choice(("cfb", "fcb"))
        for letter, side in zip(letters, draw.sides(w), strict=True):
            for axis in side:
                roles[axis] = letter
    if "c" not in roles and draw.chance(0.95):
        roles[draw.rng.randrange(len(roles))] = "c"
    met = [axis for axis, role in enumerate(roles) if role != "f"]
    meets = _match(draw, x.shape, [w.shape[axis] for axis in met])
    if meets is None:
        free = [draw.size() for _ in range(draw.rng.randint(0, 2))]
        order = draw.shuffled(range(len(met) + len(free)))
        sizes = [*(w.shape[axis] for axis in met), *free]
        shape = tuple(sizes[place] for place in order)
        if not small(shape):
            return None
        x = draw.make(scope, f"fit({x.name}, {shape})", shape)
        meets = [order.index(i) for i in range(len(met))]
    pairs = dict(zip(met, meets, strict=True))
    return draw.rng.choice(_SPELLINGS)(draw, scope, w, x, roles, pairs)


def _match(draw: Draw, have: Shape, want: Sequence[int]) -> list[int] | None:
    """Find an axis of its own for every size wanted."""
    free, found = draw.shuffled(range(len(have))), []
    for size in want:
        axis = next((axis for axis in free if have[axis] == size), None)
        if axis is None:
            return None
        free.remove(axis)
        found.append(axis)
    return found


def _einsum(draw: Draw, scope: Scope, w: Var, x: Var, roles: list[str], pairs: dict[int, int]):
    w_letters = draw.rng.sample(string.ascii_lowercase, len(w.shape))
    unused = [letter for letter in string.ascii_lowercase if letter not in w_letters]
    x_letters = draw.rng.sample(unused, len(x.shape))
    for w_axis, x_axis in pairs.items():
        x_letters[x_axis] = w_letters[w_axis]
    sizes = dict(zip([*w_letters, *x_letters], [*w.shape, *x.shape], strict=True))
    gone = {w_letters[axis] for axis, role in enumerate(roles) if role == "c"}
    if draw.chance(0.1):  # a letter that stands in one operand alone and is summed over
        gone.add(draw.rng.choice(list(sizes)))
    out = draw.shuffled([letter for letter in sizes if letter not in gone])
    shape = tuple(sizes[letter] for letter in out)
    terms = [("".join(x_letters), x.name), ("".join(w_letters), w.name)]
    if draw.chance(0.5):
        terms.reverse()
    subscripts = f"{terms[0][0]},{terms[1][0]}->{''.join(out)}"
    (left, right), ending = _cast(draw, [terms[0][1], terms[1][1]])
    return _finish(draw, scope, f'jnp.einsum("{subscripts}", {left}, {right}){ending}', shape)


def _cast(draw: Draw, names: Sequence[str]) -> tuple[list[str], str]:
    if not draw.lowered or draw.chance(0.6):
        return list(names), ""
    return [f"{name}.astype(LOW)" for name in names], ".astype(HIGH)"


def _dot_general(draw: Draw, scope: Scope, w: Var, x: Var, roles: list[str], pairs: dict[int, int]):
    contracted = draw.shuffled([axis for axis in pairs if roles[axis] == "c"])
    batched = draw.shuffled([axis for axis in pairs if roles[axis] == "b"])
    sides = [
        (w, contracted, batched),
        (x, [pairs[a] for a in contracted], [pairs[a] for a in batched]),
    ]
    if draw.chance(0.5):
        sides.reverse()
    (left, left_c, left_b), (right, right_c, right_b) = sides
    numbers = ((tuple(left_c), tuple(right_c)), (tuple(left_b), tuple(right_b)))
    rest = [
        size
        for var, gone in ((left, [*left_c, *left_b]), (right, [*right_c, *right_b]))
        for axis, size in enumerate(var.shape)
        if axis not in gone
    ]
    shape = (*(left.shape[axis] for axis in left_b), *rest)
    names, ending = _cast(draw, [left.name, right.name])
    wider = ""
    if ending and draw.chance(0.5):
        wider, ending = ", preferred_element_type=HIGH", ""
    expression = f"lax.dot_general({names[0]}, {names[1]}, {numbers}{wider}){ending}"
    return _finish(draw, scope, expression, shape)


def _short(draw: Draw, scope: Scope, w: Var, x: Var, roles: list[str], pairs: dict[int, int]):
    """`@`, tensordot, inner, or the product of each row by vmap."""
    contracted = [axis for axis in pairs if roles[axis] == "c"]
    batched = [axis for axis in pairs if roles[axis] == "b"]
    if len(batched) > 1 or not contracted:
        return None
    left, right = draw.shuffled(
        [(w, contracted, batched), (x, [pairs[a] for a in contracted], [pairs[a] for a in batched])]
    )
    if batched:
        moved = [[axis - (axis > batch[0]) for axis in axes] for _, axes, batch in (left, right)]
        product = f"lambda s, t: jnp.tensordot(s, t, axes={moved})"
        mapped = f"jax.vmap({product}, in_axes={(left[2][0], right[2][0])})"
        expression = f"{mapped}({left[0].name}, {right[0].name})"
    else:
        expression = f"jnp.tensordot({left[0].name}, {right[0].name}, axes={[left[1], right[1]]})"
    rest = [
        size
        for var, axes, batch in (left, right)
        for axis, size in enumerate(var.shape)
        if axis not in (*axes, *batch)
    ]
    return _finish(draw, scope, expression, (*(w.shape[a] for a in batched), *rest))


_SPELLINGS = (_einsum, _einsum, _einsum, _dot_general, _dot_general, _short)


@step("meet", 3)
def matrix_product(draw: Draw, scope: Scope):
    """`@` with every kind of operand that it takes."""
    draw.prepare(scope)
    w = draw.weight(scope, most=4)
    if w is None:
        return None
    data_first = draw.chance(0.6)
    axis = (-2 if len(w.shape) > 1 else -1) if data_first else -1
    inner, lead = w.shape[axis], w.shape[:-2]
    own = draw.shape(1) if draw.chance(0.7) else ()
    if own or lead:
        tokens = own or (draw.size(),)
        x_shape = (*lead, *((*tokens, inner) if data_first else (inner, *tokens)))
    else:
        x_shape = (inner,)
    if not small(x_shape):
        return None
    x = draw.make(scope, f"fit({draw.data(scope).name}, {x_shape})", x_shape)
    left, right = (x, w) if data_first else (w, x)
    outer = [
        *(left.shape[-2:-1] if len(left.shape) > 1 else ()),
        *(right.shape[-1:] if len(right.shape) > 1 else ()),
    ]
    return _finish(draw, scope, f"{left.name} @ {right.name}", (*lead, *outer))


@step("meet", 1.5)
def chain(draw: Draw, scope: Scope):
    """One einsum of data and two weights, or of a weight, data and its own transpose."""
    first, second = draw.weight(scope, 2, 3), draw.weight(scope, 2, 3)
    if first is None or second is None:
        return None
    link = [(i, j) for i, a in enumerate(first.shape) for j, b in enumerate(second.shape) if a == b]
    if not link:
        return None
    i, j = draw.rng.choice(link)
    a, b = list("abc"[: len(first.shape)]), list("def"[: len(second.shape)])
    b[j] = a[i]
    meet = draw.rng.choice([axis for axis in range(len(a)) if axis != i])
    x_shape = (draw.size(), first.shape[meet])
    x = draw.make(scope, f"fit({draw.data(scope).name}, {x_shape})", x_shape)
    terms = draw.shuffled(
        [("".join(a), first.name), ("".join(b), second.name), (f"x{a[meet]}", x.name)]
    )
    sizes = dict(zip([*a, *b, "x"], [*first.shape, *second.shape, x_shape[0]], strict=True))
    out = draw.shuffled([letter for letter in sizes if letter not in (a[i], a[meet])])
    subscripts = f"{','.join(term for term, _ in terms)}->{''.join(out)}"
    expression = f'jnp.einsum("{subscripts}", {", ".join(name for _, name in terms)})'
    return _finish(draw, scope, expression, tuple(sizes[letter] for letter in out))


@step("meet", 2)
def lookup(draw: Draw, scope: Scope):
    w = draw.weight(scope, most=3)
    if w is None:
        return None
    axis = draw.rng.randrange(len(w.shape))
    size, ids = w.shape[axis], draw.shape(2)
    positions = (
        f"jnp.array({[draw.rng.randrange(size) for _ in range(math.prod(ids))]}).reshape({ids})"
    )
    shape = (*w.shape[:axis], *ids, *w.shape[axis + 1 :])
    if draw.chance(0.5):
        return _finish(draw, scope, f"{w.name}[{':, ' * axis}{positions}]", shape)
    if draw.chance(0.5) and axis == 0:
        one_hot = f"jax.nn.one_hot({positions}, {size}, dtype=HIGH)"
        return _finish(draw, scope, f"jnp.tensordot({one_hot}, {w.name}, 1)", shape)
    return _finish(draw, scope, f"jnp.take({w.name}, {positions}, axis={axis})", shape)


@step("meet", 1)
def ragged_product(draw: Draw, scope: Scope):
    w = draw.weight_like(scope, (0,), 1) if draw.chance(0.7) else None
    w = w or draw.weight(scope, 3, 3)
    if w is None or len(w.shape) != 3:
        return None
    experts, inside, outside = w.shape
    sizes = [draw.rng.randint(0, 3) for _ in range(experts)]
    tokens = sum(sizes) + draw.rng.choice((0, 0, 1))
    if tokens == 0:
        return None
    x = f"fit({draw.data(scope).name}, {(tokens, inside)})"
    expression = f"lax.ragged_dot({x}, {w.name}, jnp.array({sizes}, jnp.int32))"
    return _finish(draw, scope, expression, (tokens, outside))


@step("meet", 1.5)
def convolution(draw: Draw, scope: Scope):
    own = draw.weight_like(scope, (), 1) if draw.chance(0.8) else None
    w = own if own and len(own.shape) in (3, 4) else draw.weight(scope, 3, 4)
    if w is None:
        return None
    spatial = "HW"[: len(w.shape) - 2]
    layout = "".join(draw.shuffled(f"{spatial}IO"))
    if w == own:  # the axis that the pair calls its output is the one that gives the channels
        out, now = draw.kernels[w.name].out_axes[0], layout.index("O")
        letters = list(layout)
        letters[now], letters[out] = letters[out], letters[now]
        layout = "".join(letters)
    sizes = dict(zip(layout, w.shape, strict=True))
    groups = draw.rng.choice([g for g in range(1, sizes["O"] + 1) if sizes["O"] % g == 0])
    by_batch = groups > 1 and draw.chance(0.15)
    batch = groups if by_batch else draw.rng.randint(1, 2)
    channels = sizes["I"] * (1 if by_batch else groups)
    data, out = ("".join(draw.shuffled(f"N{spatial}C")) for _ in range(2))
    window = {letter: sizes[letter] + draw.rng.randint(0, 2) for letter in spatial}
    have = {"N": batch, "C": channels, **window}
    x_shape = tuple(have[letter] for letter in data)
    if not small(x_shape):
        return None
    padding = draw.rng.choice(("SAME", "VALID"))
    stride = draw.rng.choice((1, 1, 2))
    options = f", {'batch' if by_batch else 'feature'}_group_count={groups}"
    dilation = 1
    if padding == "SAME" and draw.chance(0.3):
        dilation = 2
        options += f", rhs_dilation={(2,) * len(spatial)}"
    left = {
        letter: -(-window[letter] // stride)
        if padding == "SAME"
        else (window[letter] - dilation * (sizes[letter] - 1) - 1) // stride + 1
        for letter in spatial
    }
    made = {"N": batch // groups if by_batch else batch, "C": sizes["O"], **left}
    expression = (
        f"lax.conv_general_dilated(fit({draw.data(scope).name}, {x_shape}), {w.name}, "
        f'{(stride,) * len(spatial)}, "{padding}", '
        f'dimension_numbers=("{data}", "{layout}", "{out}"){options})'
    )
    return _finish(draw, scope, expression, tuple(made[letter] for letter in out))


@step("meet", 0.6)
def own_rule(draw: Draw, scope: Scope):
    """A weight that goes into a function with a derivative of its own."""
    w = draw.weight(scope, most=3)
    if w is None:
        return None
    own = "jvp"
    if draw.forward and draw.reverse and draw.chance(0.3):
        draw.forward, own = False, "vjp"  # JAX has no forward mode for these
    elif not draw.forward and draw.chance(0.5):
        own = "vjp"
    x_shape = (draw.size(), w.shape[0])
    x = f"fit({draw.data(scope).name}, {x_shape})"
    return _finish(
        draw, scope, f"product_with_own_{own}({x}, {w.name})", (x_shape[0], *w.shape[1:])
    )


def _finish(draw: Draw, scope: Scope, expression: str, shape: Shape):
    """Write the line, with a bend behind it now and then."""
    if not small(shape):
        return None
    bent = draw.rng.choices(
        ("{}", "jnp.tanh({})", "0.5 * {}", "jax.nn.silu({})"), weights=(5, 3, 2, 1)
    )[0]
    return draw.make(
        scope, bent.format(expression if bent != "0.5 * {}" else f"({expression})"), shape
    )
