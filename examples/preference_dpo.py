"""Direct preference optimization with one model in memory: the frozen base is its own reference.

    python examples/preference_dpo.py
    python examples/preference_dpo.py --steps 200 --beta 0.3

DPO raises an answer that people chose over one that they rejected, measured against a reference
model that must not move. With LoRA that reference is there already: W0 without a and b. So there is
no second copy, and the reference's log-probabilities come from the same arrays in the same step.

Here "people" want queries with their keywords in capitals. The bundled model cannot answer the
bundled questions without an adapter, so both answers are given: the right query in capitals, and
the same query in small letters. A minute on two CPU cores.

Reference:
    Rafailov et al., Direct Preference Optimization (arXiv:2305.18290), equation 7.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl
from jax_lora.bundled import data_path, model_path
from jax_lora.data.data_folder import read_data
from jax_lora.data.encoding import encode_row
from jax_lora.data.rows import Row
from jax_lora.data.tokenizer import Tokenizer

LENGTH, ROWS = 96, 8  # tokens of an answered question, pairs of a batch
KEYWORDS = ("select", "from", "where", "order by", "group by", "and", "or", "limit", "desc", "asc")


class Pairs(NamedTuple):
    """Answers by the side of each other; the last axis of `ids` is of whole rows, padded.

    Attributes:
      ids: (pairs, 2, LENGTH) int32; the chosen answer comes first.
      answer: (pairs, 2, LENGTH) bool, the tokens of the answers.
    """

    ids: np.ndarray
    answer: np.ndarray


# --- the preferences -----------------------------------------------------------------------------


def shout(query: str) -> str:
    """Write a query's keywords in capitals; what stands in quotes is left alone."""
    parts = query.split("'")
    for place in range(0, len(parts), 2):
        for word in KEYWORDS:
            parts[place] = f" {parts[place]} ".replace(f" {word} ", f" {word.upper()} ")[1:-1]
    return "'".join(parts)


def make_pairs(split: str, tokenizer: Tokenizer, most: int) -> Pairs:
    """Make preferences of the bundled questions, as many as are asked for and fit."""
    ids, answer = [], []
    for row in read_data(data_path()).split(split).rows:
        query = row.fields["completion"]
        both = [encode_row(_answered(row, text), tokenizer) for text in (shout(query), query)]
        if len(ids) < most and max(len(each.ids) for each in both) <= LENGTH:
            ids.append([_padded(each.ids) for each in both])
            answer.append([_padded(each.learned) for each in both])
    return Pairs(np.asarray(ids, np.int32), np.asarray(answer, bool))


def _answered(row: Row, answer: str) -> Row:
    return dataclasses.replace(row, fields={**row.fields, "completion": answer})


def _padded(values: Sequence[int]) -> list[int]:
    return [*values, *[0] * (LENGTH - len(values))]


# --- the loss ------------------------------------------------------------------------------------


def log_probability(logits: jax.Array, ids: jax.Array, answer: jax.Array) -> jax.Array:
    """Sum the log-probabilities of the answers' tokens.

    Args:
      logits: (rows, LENGTH, vocabulary).
      ids: (rows, LENGTH).
      answer: (rows, LENGTH).

    Returns:
      (rows,)
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return -jnp.sum(jnp.where(answer[:, 1:], losses, 0.0), axis=-1)


def dpo_loss(policy: jax.Array, reference: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Equation 7: -log sigmoid(beta * (reward of the chosen - reward of the rejected)).

    Args:
      policy: Log-probabilities with the adapter, (pairs, 2), the chosen answers first.
      reference: The same without.
      beta: How far the policy is held to the reference.

    Returns:
      The mean loss, and the margins of the rewards, (pairs,).
    """
    reward = beta * (policy - reference)  # (pairs, 2)
    margin = reward[:, 0] - reward[:, 1]
    return -jnp.mean(jax.nn.log_sigmoid(margin)), margin


def make_loss(model: Any, beta: float) -> Any:
    """Make `loss(adapter, variables, pairs) -> (mean loss, margins)`."""

    def loss(adapter: jl.Adapter, variables: Any, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        ids, answer = (jnp.asarray(x).reshape(-1, LENGTH) for x in pairs)  # (2 pairs, LENGTH)
        tuned = jl.lora_apply(model.apply)(jl.combine(variables, adapter), ids)
        base = model.apply(variables, ids)  # W0 by itself; no gradient comes this way
        policy, reference = (log_probability(each, ids, answer) for each in (tuned, base))
        return dpo_loss(policy.reshape(-1, 2), reference.reshape(-1, 2), beta)

    return loss


# --- all together --------------------------------------------------------------------------------


def run(steps: int, rank: int, beta: float, most: int = 400) -> dict[str, list[float]]:
    """Train, report; return the held-out loss, margin and share of chosen, before and after."""
    model, params = jl.models.load(model_path(), dtype="float32")
    variables, tokenizer = {"params": params}, Tokenizer.load(model_path())
    pairs, unseen = make_pairs("train", tokenizer, most), make_pairs("test", tokenizer, 32)
    kernels = jl.find_kernels(model.apply, variables, pairs.ids[0])
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    summary = jl.summary(variables, adapter)
    print(f"{len(pairs.ids)} preferences; base {summary.base_bytes / 1e6:.1f} MB, once,", end=" ")
    print(f"and adapter {summary.adapter_bytes / 1e6:.1f} MB")

    loss, tx = make_loss(model, beta), optax.adam(1e-3)
    measure = jax.jit(loss)

    @jax.jit
    def step(adapter: jl.Adapter, state: Any, pairs: Pairs) -> Any:
        gradient, _ = jax.grad(loss, has_aux=True)(adapter, variables, pairs)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    def report(name: str, adapter: jl.Adapter) -> list[float]:
        value, margin = measure(adapter, variables, unseen)
        found = [float(value), float(margin.mean()), float(jnp.mean(margin > 0))]
        print(f"{name:<7} loss {found[0]:.4f}, margin {found[1]:+.3f}, chosen first {found[2]:.0%}")
        return found

    before, state = report("before", adapter), tx.init(adapter)
    for number in range(steps):
        chosen = np.random.default_rng(number).choice(len(pairs.ids), ROWS)
        adapter, state = step(adapter, state, Pairs(pairs.ids[chosen], pairs.answer[chosen]))
    return {"before": before, "after": report("after", adapter)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    options = parser.parse_args(argv)
    run(options.steps, options.rank, options.beta)


if __name__ == "__main__":
    main()
