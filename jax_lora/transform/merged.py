"""The merged form: x · (W0 + scale * a · b) forward and for dx, da and db from thin products.

Plain automatic differentiation of this product would form a gradient of W0's size on its way to
da and db. So its derivative is given here:

    d(x · M) = dx · M + x · dW0 + scale * ((x · da) · b + (x · a) · db),    M = W0 + scale * a · b

as a `custom_jvp`, from which JAX derives reverse mode by transposition. M in the first term is
formed again in the backward pass, so that none is kept between the passes.
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

from jax_lora import labelled, meeting
from jax_lora.labels import RANK, Label
from jax_lora.lowrank import accumulation_dtype
from jax_lora.meeting import Meeting

Array = jax.Array
_ONE: Label = "one"  # the batch dimension
_FEW = 8  # outer products that are added up one by one; XLA keeps twice as many unfused


@dataclasses.dataclass(frozen=True)
class Product:
    """The contraction itself, of x with an array of W0's shape: a `dot_general` in its order."""

    dimension_numbers: Any
    precision: Any
    preferred_element_type: Any
    out_sharding: Any
    weight_first: bool

    @classmethod
    def of(cls, eqn: Any, weight_first: bool) -> Product | None:
        """Read a `dot_general` equation, or return None if it has parameters unknown here."""
        names = {field.name for field in dataclasses.fields(cls)} - {"weight_first"}
        if not set(eqn.params) <= names:
            return None
        return cls(**{name: eqn.params.get(name) for name in names}, weight_first=weight_first)

    def __call__(self, x: Array, w: Array) -> Array:
        """Contract."""
        left, right = (w, x) if self.weight_first else (x, w)
        sharding = {} if self.out_sharding is None else {"out_sharding": self.out_sharding}
        return lax.dot_general(
            left,
            right,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            **sharding,
        )


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the values that meet the same x: how it is contracted, and how its factors lie."""

    product: Product
    meeting: Meeting
    w_labels: tuple[Label | None, ...]

    def form(self, w: Array, a: Array, b: Array) -> Array:
        """Form M = W0 + scale * a · b: (in, out).

        Never by multiply and reduce, which XLA for CPU fuses into some of the products that read
        M, and then gives wrong numbers.
        """
        wide = accumulation_dtype(w.dtype)
        a, b = a.astype(wide) * jnp.asarray(self.meeting.scale, wide), b.astype(wide)
        rank = a.shape[self.meeting.a_labels.index(RANK)]
        delta = self._outer_products(a, b) if rank <= _FEW else self._product(a, b)
        return w + labelled.arrange(*delta, self.w_labels, w.shape).astype(w.dtype)

    def _outer_products(self, a: Array, b: Array) -> tuple[Array, list[Label]]:
        """Add up r outer products: fused, W0 is read once and M written once.

        By halves: every operation that XLA fuses costs time to compile, and there are fewer so.
        """
        labels = [RANK, *self._delta_labels]
        terms = labelled.spread(a, self.meeting.a_labels, labels) * labelled.spread(
            b, self.meeting.b_labels, labels
        )  # (r, in, out)
        while len(terms) % 2 == 0:
            terms = lax.add(*jnp.split(terms, 2))
        each = [lax.index_in_dim(terms, i, keepdims=False) for i in range(len(terms))]
        return functools.reduce(lax.add, each), labels[1:]

    def _product(self, a: Array, b: Array) -> tuple[Array, list[Label]]:
        """Multiply, in a batch of 1: rematerialization policies do not take it for the model's."""
        product, have = labelled.product(  # (1, in, out) in some order
            a[None],
            (_ONE, *self.meeting.a_labels),
            b[None],
            (_ONE, *self.meeting.b_labels),
            (_ONE, *self._delta_labels),
            "highest",
        )
        delta = lax.squeeze(product, [have.index(_ONE)])
        return delta, [label for label in have if label != _ONE]

    @property
    def _delta_labels(self) -> list[Label]:
        return [label for label in self.w_labels if label is not None]


Weights = tuple[tuple[Array, Array, Array], ...]  # (W0, a, b) per member


def multiply(members: Sequence[Member], x: Array, weights: Weights) -> list[Array]:
    """Contract x with W0 + scale * a · b of every member, in the merged form.

    Args:
      members: What meets x.
      x: The data of all of them.
      weights: `(W0, a, b)` per member.

    Returns:
      The contractions' results.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), equation 3, summed before the product.
    """
    return _multiply(tuple(members))(x, weights)


@functools.lru_cache(maxsize=1024)
def _multiply(members: tuple[Member, ...]) -> Callable[[Array, Weights], list[Array]]:
    """Return the rule for these members: the same object again, so that layers are traced once.

    Under jit also where the model runs op by op, so that forming M is fused.
    """

    def products(x: Array, weights: Weights) -> list[Array]:
        return [
            member.product(x, member.form(*weight))
            for member, weight in zip(members, weights, strict=True)
        ]

    formed_again = jax.checkpoint(products)
    rule = jax.custom_jvp(products)

    @functools.partial(rule.defjvp, symbolic_zeros=True)
    def derivative(primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
        (x, weights), (dx, dweights) = primals, tangents
        # Products in the open, not a call of the rule: rematerialization policies have to see them.
        outs = products(x, weights)
        terms: list[list[Array]] = [[] for _ in members]
        if not _is_zero(dx):
            _put(terms, range(len(members)), formed_again(dx, weights))
        _put_products(terms, members, x, dweights)
        _put_thin_products(terms, members, x, weights, dweights)
        return outs, [_sum(each, out) for each, out in zip(terms, outs, strict=True)]

    return jax.jit(rule)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _sum(terms: Sequence[Array], out: Array) -> Array:
    """Add the terms of one tangent, sharded as its primal is where types hold shardings."""
    if not terms:
        return jnp.zeros_like(out)
    want = jax.typeof(out).sharding
    laid_out = [
        term if jax.typeof(term).sharding == want else jax.sharding.reshard(term, want)
        for term in terms
    ]
    return functools.reduce(lax.add, laid_out)


def _put(terms: list[list[Array]], where: Sequence[int], added: Sequence[Array]) -> None:
    for index, term in zip(where, added, strict=True):
        terms[index].append(term)


def _put_products(
    terms: list[list[Array]], members: Sequence[Member], x: Array, dweights: Any
) -> None:
    """Add x · dW0: W0 is frozen, but the model may have scaled it by something that is not."""
    moving = [i for i, (dw, _, _) in enumerate(dweights) if not _is_zero(dw)]
    _put(terms, moving, [members[i].product(x, dweights[i][0]) for i in moving])


def _put_thin_products(
    terms: list[list[Array]], members: Sequence[Member], x: Array, weights: Weights, dweights: Any
) -> None:
    """Add scale * (x · da) · b and scale * (x · a) · db, the x's of all members together."""
    meetings = [member.meeting for member in members]
    factors = [m.order(a, b) for m, (_, a, b) in zip(meetings, weights, strict=True)]
    tangents = [m.order(da, db) for m, (_, da, db) in zip(meetings, dweights, strict=True)]
    for place in (0, 1):  # the first factor moves, then the second
        moving = [i for i, pair in enumerate(tangents) if not _is_zero(pair[place])]
        firsts = [(tangents if place == 0 else factors)[i][0] for i in moving]
        seconds = [(factors if place == 0 else tangents)[i][1] for i in moving]
        if moving:
            those = tuple(meetings[i] for i in moving)
            thins = meeting.narrow(those, x, firsts, hidden=place == 1)  # x · a is no tangent
            wide = [
                meeting.widen(m, *thin, second, hidden=False)
                for m, thin, second in zip(those, thins, seconds, strict=True)
            ]
            _put(terms, moving, wide)
