"""Direct preference optimization with one model in memory: the base model is the reference.

    python examples/preference_dpo.py
    python examples/preference_dpo.py --steps 200 --beta 0.3

DPO makes chosen responses more likely than rejected ones, relative to a frozen reference model.
With LoRA, the reference is the base model without the adapter. No second copy is needed, and the
log-probabilities of the reference are computed from the same arrays in the same step.

The preferences are built from the bundled text-to-SQL questions. The correct query is the chosen
response; the rejected one has its comparisons, aggregates and sort order reversed (< and >, min and
max, ascending and descending). The example takes about 35 seconds on two CPU cores.

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

LENGTH, BATCH_SIZE = 72, 8  # tokens per sequence, pairs per batch
OPPOSITES = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "max(": "min(", "min(": "max("}


class Pairs(NamedTuple):
    """Preference pairs: the chosen response first, the rejected one second.

    Attributes:
      ids: (pairs, 2, LENGTH) int32, padded on the right.
      answer: (pairs, 2, LENGTH) bool, True at the tokens of the responses.
    """

    ids: np.ndarray
    answer: np.ndarray


class Score(NamedTuple):
    """Means over pairs, and shares of pairs in which the chosen response scores higher."""

    loss: float
    margin: float
    rewarded_more: float
    likelier: float


def reversed_query(query: str) -> str:
    """Reverse the comparisons, aggregates and sort order of a query, if it has any."""
    words = " ".join(OPPOSITES.get(word, word) for word in query.split(" "))
    return re.sub(r"( order by \w+)( desc)?", lambda by: by[1] + ("" if by[2] else " desc"), words)


def make_pairs(split: str, tokenizer: Tokenizer, most: int) -> Pairs:
    """Build at most `most` preference pairs from a split of the bundled data."""
    ids, answer = [], []
    for row in read_data(data_path()).split(split).rows:
        right = row.fields["completion"]
        fields = [{**row.fields, "completion": text} for text in (right, reversed_query(right))]
        both = [encode_row(dataclasses.replace(row, fields=each), tokenizer) for each in fields]
        fits = max(len(each.ids) for each in both) <= LENGTH
        if reversed_query(right) != right and fits and len(ids) < most:
            ids.append([np.pad(each.ids, (0, LENGTH - len(each.ids))) for each in both])
            answer.append([np.pad(each.loss_mask, (0, LENGTH - len(each.ids))) for each in both])
    return Pairs(np.asarray(ids, np.int32), np.asarray(answer, bool))


def log_probability(logits: jax.Array, ids: jax.Array, answer: jax.Array) -> jax.Array:
    """Sum the log-probabilities of the response tokens, (batch, LENGTH, vocabulary) -> (batch,)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return -jnp.sum(jnp.where(answer[:, 1:], losses, 0.0), axis=-1)


def dpo_loss(policy: jax.Array, reference: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Compute equation 7: -log sigmoid(reward of chosen - reward of rejected).

    Args:
      policy: Log-probabilities with the adapter, (pairs, 2), chosen first.
      reference: Log-probabilities without the adapter, (pairs, 2).
      beta: Scale of the rewards.

    Returns:
      The mean loss, and the margins of the rewards (pairs,).
    """
    reward = beta * (policy - reference)  # (pairs, 2)
    margin = reward[:, 0] - reward[:, 1]
    return -jnp.mean(jax.nn.log_sigmoid(margin)), margin


def make_loss(model: Any, beta: float) -> Any:
    """Return `loss(adapter, variables, pairs) -> mean loss, (margins, log-probabilities)`."""

    def loss(adapter: jl.Adapter, variables: Any, pairs: Pairs) -> Any:
        variables = jax.lax.stop_gradient(variables)  # leaves without an adapter are frozen too
        ids, answer = (jnp.asarray(x).reshape(-1, LENGTH) for x in pairs)  # (2 pairs, LENGTH)
        tuned = jl.lora_apply(model.apply)(jl.combine(variables, adapter), ids)
        base = model.apply(variables, ids)  # the same base weights without the adapter
        policy, reference = (log_probability(each, ids, answer) for each in (tuned, base))
        policy = policy.reshape(-1, 2)  # (pairs, 2)
        value, margin = dpo_loss(policy, reference.reshape(-1, 2), beta)
        return value, (margin, policy)

    return loss


def make_step(loss: Any, tx: optax.GradientTransformation) -> Any:
    """Return the jitted `step(adapter, state, variables, pairs) -> (adapter, state)`."""

    @jax.jit
    def step(adapter: jl.Adapter, state: Any, variables: Any, pairs: Pairs) -> Any:
        gradient, _ = jax.grad(loss, has_aux=True)(adapter, variables, pairs)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    return step


def run(steps: int, rank: int, beta: float, most: int = 1000) -> tuple[Score, Score]:
    """Train and report; return the scores on held-out preferences before and after."""
    model, params = jl.models.load(model_path(), dtype="float32")
    variables, tokenizer = {"params": params}, Tokenizer.load(model_path())
    pairs, unseen = make_pairs("train", tokenizer, most), make_pairs("test", tokenizer, 64)
    kernels = jl.find_kernels(model.apply, variables, pairs.ids[0])
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    summary = jl.summary(variables, adapter)
    base, added = summary.base_bytes / 1e6, summary.adapter_bytes / 1e6
    print(f"{len(pairs.ids)} training preferences, {len(unseen.ids)} held out")
    print(f"{base + added:.1f} MB of parameters: base {base:.1f} MB, adapter {added:.1f} MB")
    print(f"with a separate reference model: {2 * base + added:.1f} MB")

    loss, tx = make_loss(model, beta), optax.adam(3e-3)
    measure, step = jax.jit(loss), make_step(loss, tx)

    def report(name: str, adapter: jl.Adapter) -> Score:
        value, (margin, policy) = measure(adapter, variables, unseen)
        shares = jnp.mean(margin > 0), jnp.mean(policy[:, 0] > policy[:, 1])
        score = Score(*map(float, (value, margin.mean(), *shares)))
        print(f"{name:<7} loss {score.loss:.4f}, reward margin {score.margin:+.3f}; ", end="")
        print(
            f"chosen response: higher reward {score.rewarded_more:.0%}, "
            f"higher likelihood {score.likelier:.0%}"
        )
        return score

    before, state = report("before", adapter), tx.init(adapter)
    for number in range(steps):
        chosen = np.random.default_rng(number).choice(len(pairs.ids), BATCH_SIZE, replace=False)
        batch = Pairs(pairs.ids[chosen], pairs.answer[chosen])
        adapter, state = step(adapter, state, variables, batch)
    return before, report("after", adapter)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    options = parser.parse_args(argv)
    run(options.steps, options.rank, options.beta)


if __name__ == "__main__":
    main()
