"""The merged product: x · (W0 + scale * a · b) forward and for dx; da and db stay factored.

Automatic differentiation of this product would compute a gradient of W0's size for da and db.
Therefore the derivative is defined here, as a `custom_jvp` that JAX transposes for reverse mode:

    d(x · M) = dx · M + x · dW0 + scale * ((x · da) · b + (x · a) · db),    M = W0 + scale * a · b

The backward pass computes M in the first term again, so that no residual holds it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jax_lora.algebra.factored_product import Projection, project_down, project_up
from jax_lora.algebra.low_rank import Axes, accumulation_dtype
from jax_lora.algebra.named_array import NamedArray, product
from jax_lora.algebra.named_axes import RANK, AxisName

Array = jax.Array
_FEW = 8  # largest rank computed as a sum of outer products; XLA does not fuse twice as many


@dataclasses.dataclass(frozen=True)
class Member:
    """One of several `dot_general`s of the same x with an array of W0's shape."""

    plan: Projection  # how x pairs with the factors, and the model's precision and operand order
    axes: Axes  # of W0
    dimension_numbers: Any  # this and the following as in `lax.dot_general`
    preferred_element_type: Any
    out_sharding: Any

    def contract(self, x: Array, w: Array) -> Array:
        """Compute the `dot_general` of the model."""
        left, right = (x, w) if self.plan.x_first else (w, x)
        sharding = {} if self.out_sharding is None else {"out_sharding": self.out_sharding}
        return lax.dot_general(
            left,
            right,
            self.dimension_numbers,
            precision=self.plan.precision,
            preferred_element_type=self.preferred_element_type,
            **sharding,
        )

    def merged(self, w: Array, a: NamedArray, b: NamedArray) -> Array:
        """Compute M = W0 + scale * a · b: (in, out).

        It must not be a multiplication and a reduction: XLA for CPU fuses these into some of the
        products that use M, with wrong results.
        """
        wide = accumulation_dtype(w.dtype)
        a = NamedArray(a.array.astype(wide) * jnp.asarray(self.plan.scale, wide), a.axes)
        b = b.astype(wide)
        if a.size_of(RANK) <= _FEW:
            update = self._outer_products(a, b)
        else:
            update = product(a, b, self._names, "highest")
        return w + update.arranged(self.axes, w.shape).astype(w.dtype)

    def _outer_products(self, a: NamedArray, b: NamedArray) -> NamedArray:
        """Add r outer products, which XLA fuses: W0 is read once, and M is written once.

        They are added by halves, as every fused operation adds compile time.
        """
        names = (RANK, *self._names)
        terms = a.spread(names) * b.spread(names)  # (r, in, out)
        while len(terms) % 2 == 0:
            terms = lax.add(*jnp.split(terms, 2))
        each = [lax.index_in_dim(terms, i, keepdims=False) for i in range(len(terms))]
        return NamedArray(functools.reduce(lax.add, each), names[1:])

    @property
    def _names(self) -> tuple[AxisName, ...]:
        return tuple(name for name in self.axes if name is not None)


Weights = tuple[tuple[Array, NamedArray, NamedArray], ...]  # (W0, a, b) per member


def multiply(members: Sequence[Member], x: Array, weights: Weights) -> list[Array]:
    """Contract x with W0 + scale * a · b of every member, given its `(W0, a, b)`.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), equation 3, with the sum before the product.
    """
    return _multiply(tuple(members))(x, weights)


@functools.lru_cache(maxsize=1024)
def _multiply(members: tuple[Member, ...]) -> Callable[[Array, Weights], list[Array]]:
    """Return the function for these members: a cached object, so that equal layers are traced once.

    It is jitted so that the computation of M is fused even if the model runs without jit.
    """

    def products(x: Array, weights: Weights) -> list[Array]:
        return [
            member.contract(x, member.merged(*weight))
            for member, weight in zip(members, weights, strict=True)
        ]

    computed_again = jax.checkpoint(products)
    rule = jax.custom_jvp(products)

    @functools.partial(rule.defjvp, symbolic_zeros=True)
    def derivative(primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
        (x, weights), (dx, dweights) = primals, tangents
        # Not a call of `rule`: rematerialization policies must see the products.
        outs = products(x, weights)
        terms = [] if _is_zero(dx) else [*enumerate(computed_again(dx, weights))]
        terms += _base_terms(members, x, dweights)
        terms += _factor_terms(members, x, weights, dweights)
        sums = [_sum([t for i, t in terms if i == index], out) for index, out in enumerate(outs)]
        return outs, sums

    return jax.jit(rule)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _sum(terms: Sequence[Array], out: Array) -> Array:
    """Add the terms of a tangent, with the sharding of the primal if it is part of the type."""
    if not terms:
        return jnp.zeros_like(out)
    want = jax.typeof(out).sharding
    laid_out = [
        term if jax.typeof(term).sharding == want else jax.sharding.reshard(term, want)
        for term in terms
    ]
    return functools.reduce(lax.add, laid_out)


Terms = list[tuple[int, Array]]  # terms of the tangents, with the index of the member


def _base_terms(members: Sequence[Member], x: Array, dweights: Any) -> Terms:
    """Compute x · dW0, which is not zero if the model multiplies W0 with a trained array."""
    moving = [(i, dw) for i, (dw, _, _) in enumerate(dweights) if not _is_zero(dw)]
    return [(i, members[i].contract(x, dw)) for i, dw in moving]


def _factor_terms(members: Sequence[Member], x: Array, weights: Weights, dweights: Any) -> Terms:
    """Compute scale * (x · da) · b and scale * (x · a) · db, with shared down-projections."""
    plans = [member.plan for member in members]
    factors = [plan.order(a, b) for plan, (_, a, b) in zip(plans, weights, strict=True)]
    tangents = [plan.order(da, db) for plan, (_, da, db) in zip(plans, dweights, strict=True)]
    terms: Terms = []
    for place in (0, 1):  # tangents of the first factors, then of the second ones
        moving = [i for i, pair in enumerate(tangents) if not _is_zero(pair[place].array)]
        if not moving:
            continue
        pairs = [
            (tangents[i][0], factors[i][1]) if place == 0 else (factors[i][0], tangents[i][1])
            for i in moving
        ]
        those = [plans[i] for i in moving]
        downs = project_down(those, x, pairs, hidden=place == 1)  # x · a is not a tangent
        terms += [
            (i, project_up(plan, down, second, hidden=False))
            for i, plan, down, (_, second) in zip(moving, those, downs, pairs, strict=True)
        ]
    return terms
