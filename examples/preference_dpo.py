"""Direct preference optimization with one model in memory: the frozen base is its own reference.

    python examples/preference_dpo.py
    python examples/preference_dpo.py --steps 200 --beta 0.3

DPO raises an answer that people chose over one that they rejected, measured against a reference
model that must not move. With LoRA that reference is there already: W0 without a and b. So there is
no second copy, and the reference's log-probabilities come from the same arrays in the same step.

The preferences are made of the bundled questions about tables: the right query is chosen, and the
same query with its direction turned around (at most for at least, smallest for largest, up for
down) is rejected. About 35 seconds on two CPU cores.

Reference:
    Rafailov et al., Direct Preference Optimization (arXiv:2305.18290), equation 7.
"""

import argparse
import dataclasses
import re
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
from jax_lora.data.tokenizer import Tokenizer

LENGTH, ROWS = 72, 8  # tokens of an answered question, pairs of a batch
OPPOSITES = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "max(": "min(", "min(": "max("}


class Pairs(NamedTuple):
    """Preferences; of two answers to a question the chosen one comes first.

    Attributes:
      ids: (pairs, 2, LENGTH) int32, padded on the right.
      answer: (pairs, 2, LENGTH) bool, the tokens of the answers.
    """

    ids: np.ndarray
    answer: np.ndarray


class Score(NamedTuple):
    """What is reported: means over pairs, and the shares of pairs whose chosen answer leads."""

    loss: float
    margin: float
    rewarded_more: float
    likelier: float


def turned(query: str) -> str:
    """Turn the direction of a query around; one without direction stays as it is."""
    words = " ".join(OPPOSITES.get(word, word) for word in query.split(" "))
    return re.sub(r"( order by \w+)( desc)?", lambda by: by[1] + ("" if by[2] else " desc"), words)


def make_pairs(split: str, tokenizer: Tokenizer, most: int) -> Pairs:
    """Make preferences of the bundled questions, as many as are asked for and fit."""
    ids, answer = [], []
    for row in read_data(data_path()).split(split).rows:
        right = row.fields["completion"]
        fields = [{**row.fields, "completion": text} for text in (right, turned(right))]
        both = [encode_row(dataclasses.replace(row, fields=each), tokenizer) for each in fields]
        fits = max(len(each.ids) for each in both) <= LENGTH
        if turned(right) != right and fits and len(ids) < most:
            ids.append([np.pad(each.ids, (0, LENGTH - len(each.ids))) for each in both])
            answer.append([np.pad(each.learned, (0, LENGTH - len(each.ids))) for each in both])
    return Pairs(np.asarray(ids, np.int32), np.asarray(answer, bool))


def log_probability(logits: jax.Array, ids: jax.Array, answer: jax.Array) -> jax.Array:
    """Sum the log-probabilities of the answers' tokens: (rows, LENGTH, vocabulary) -> (rows,)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return -jnp.sum(jnp.where(answer[:, 1:], losses, 0.0), axis=-1)


def dpo_loss(policy: jax.Array, reference: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Equation 7: -log sigmoid(reward of the chosen - reward of the rejected).

    Takes log-probabilities with the adapter and without, (pairs, 2), the chosen answers first.
    Returns the mean loss, and the margins of the rewards, (pairs,).
    """
    reward = beta * (policy - reference)  # (pairs, 2)
    margin = reward[:, 0] - reward[:, 1]
    return -jnp.mean(jax.nn.log_sigmoid(margin)), margin


def make_loss(model: Any, beta: float) -> Any:
    """Make `loss(adapter, variables, pairs) -> mean loss, (margins, log-probabilities)`."""

    def loss(adapter: jl.Adapter, variables: Any, pairs: Pairs) -> Any:
        variables = jax.lax.stop_gradient(variables)  # what has no adapter is frozen too
        ids, answer = (jnp.asarray(x).reshape(-1, LENGTH) for x in pairs)  # (2 pairs, LENGTH)
        tuned = jl.lora_apply(model.apply)(jl.combine(variables, adapter), ids)
        base = model.apply(variables, ids)  # the same W0 by itself
        policy, reference = (log_probability(each, ids, answer) for each in (tuned, base))
        policy = policy.reshape(-1, 2)  # (pairs, 2)
        value, margin = dpo_loss(policy, reference.reshape(-1, 2), beta)
        return value, (margin, policy)

    return loss


def make_step(loss: Any, tx: optax.GradientTransformation) -> Any:
    """Make the jitted `step(adapter, state, variables, pairs) -> (adapter, state)`."""

    @jax.jit
    def step(adapter: jl.Adapter, state: Any, variables: Any, pairs: Pairs) -> Any:
        gradient, _ = jax.grad(loss, has_aux=True)(adapter, variables, pairs)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    return step


def run(steps: int, rank: int, beta: float, most: int = 1000) -> tuple[Score, Score]:
    """Train, report; return the scores of held-out preferences, before and after."""
    model, params = jl.models.load(model_path(), dtype="float32")
    variables, tokenizer = {"params": params}, Tokenizer.load(model_path())
    pairs, unseen = make_pairs("train", tokenizer, most), make_pairs("test", tokenizer, 64)
    kernels = jl.find_kernels(model.apply, variables, pairs.ids[0])
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    summary = jl.summary(variables, adapter)
    base, added = summary.base_bytes / 1e6, summary.adapter_bytes / 1e6
    print(f"{len(pairs.ids)} preferences to learn, {len(unseen.ids)} held out")
    print(
        f"{base + added:.1f} MB of parameters: the base once, {base:.1f}, the adapter {added:.1f}"
    )
    print(f"a reference model of its own would make it {2 * base + added:.1f} MB")

    loss, tx = make_loss(model, beta), optax.adam(3e-3)
    measure, step = jax.jit(loss), make_step(loss, tx)

    def report(name: str, adapter: jl.Adapter) -> Score:
        value, (margin, policy) = measure(adapter, variables, unseen)
        shares = jnp.mean(margin > 0), jnp.mean(policy[:, 0] > policy[:, 1])
        score = Score(*map(float, (value, margin.mean(), *shares)))
        print(f"{name:<7} loss {score.loss:.4f}, margin of rewards {score.margin:+.3f}; ", end="")
        print(f"chosen: rewarded more {score.rewarded_more:.0%}, likelier {score.likelier:.0%}")
        return score

    before, state = report("before", adapter), tx.init(adapter)
    for number in range(steps):
        chosen = np.random.default_rng(number).choice(len(pairs.ids), ROWS, replace=False)
        batch = Pairs(pairs.ids[chosen], pairs.answer[chosen])
        adapter, state = step(adapter, state, variables, batch)
    return before, report("after", adapter)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    options = parser.parse_args(argv)
    run(options.steps, options.rank, options.beta)


if __name__ == "__main__":
    main()
