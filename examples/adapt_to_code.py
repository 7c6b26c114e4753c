"""Adapt a language model to a codebase: perplexity on held-out files, before and after.

    python examples/adapt_to_code.py
    python examples/adapt_to_code.py your/code --model path/to/hf_folder --steps 500 --out adapter

Without a folder the code is that of Optax, which the bundled model has never seen: it was trained
on Python's standard library. One file in twenty is held out, whole, so that no part of it is
learned. The others are packed into rows of a fixed length; a row may hold several files, and none
of them sees another. About a minute on two CPU cores.

`jax-lora train --data your/code --pack` does the same with checkpoints and validation.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.data.batches import Batch, Batches
from jax_lora.data.data_folder import read_data
from jax_lora.data.examples import make_examples
from jax_lora.data.rows import RowFile
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.finetune.loss import summed_loss

LENGTH, ROWS = 256, 8  # tokens of a row, rows of a batch
MEASURED = 60_000  # bytes of held-out files that are measured: enough, and soon done


class Score(NamedTuple):
    """How well text is predicted: e to the loss of a token, and bits for each byte of it."""

    perplexity: float
    bits_per_byte: float


def split(code: Path) -> tuple[RowFile, RowFile]:
    """Read a folder of text files into those to learn and those held out, a document a file."""
    data = read_data(code)
    return data.split("train"), data.split("test")


def measured(held_out: RowFile) -> tuple[RowFile, int]:
    """Take held-out files, in order, up to MEASURED bytes; return them and their bytes."""
    sizes = [len(row.fields["text"].encode()) for row in held_out.rows]
    count = max(1, sum(total <= MEASURED for total in itertools.accumulate(sizes)))
    return dataclasses.replace(held_out, rows=held_out.rows[:count]), sum(sizes[:count])


def packed(file: RowFile, tokenizer: Tokenizer, seed: int = 0) -> Batches:
    """Cut documents into rows of LENGTH tokens, short ones several to a row."""
    examples = make_examples(file, tokenizer, max_length=LENGTH)
    return Batches.of(examples.rows, ROWS, seed=seed, pack=LENGTH)


def run(
    code: Path, model_folder: Path, steps: int, rank: int, out: Path | None
) -> tuple[Score, Score]:
    """Adapt, report, save; return the scores before and after."""
    model, params = jl.models.load(model_folder, dtype="float32")
    variables, tokenizer = {"params": params}, Tokenizer.load(model_folder)
    learned, held_out = split(code)
    sample, size = measured(held_out)
    batches, unseen = packed(learned, tokenizer), packed(sample, tokenizer)
    print(f"{len(learned.rows)} files to learn, {len(held_out.rows)} held out, from {code}")

    kernels = jl.find_kernels(model.apply, variables, jnp.zeros((1, LENGTH), jnp.int32))
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    summary = jl.summary(variables, adapter)
    print(f"{summary.trainable:,} of {summary.total:,} parameters are trained")

    # Summed over the tokens of a batch, with how many they are: batches differ in padding.
    loss = jl.lora_apply(lambda variables, batch: summed_loss(model, variables, batch))
    measure = jax.jit(lambda adapter, batch: loss(jl.combine(variables, adapter), batch))

    def score(adapter: jl.Adapter) -> Score:
        sums = [measure(adapter, batch) for batch in unseen.once()]
        nats, tokens = (float(sum(column)) for column in zip(*sums, strict=True))
        return Score(math.exp(nats / tokens), nats / math.log(2) / size)

    tx = optax.adam(optax.cosine_decay_schedule(3e-3, max(1, steps)))

    @jax.jit
    def step(adapter: jl.Adapter, state: Any, batch: Batch) -> Any:
        def mean(adapter: jl.Adapter) -> jax.Array:
            total, tokens = loss(jl.combine(variables, adapter), batch)
            return total / tokens

        updates, state = tx.update(jax.grad(mean)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    before, state = score(adapter), tx.init(adapter)
    for number in range(steps):
        adapter, state = step(adapter, state, batches.at(number))
    after = score(adapter)
    for name, found in (("before", before), ("after", after)):
        print(
            f"{name:<7} perplexity {found.perplexity:8.2f}, {found.bits_per_byte:.3f} bits a byte"
        )
    if out is not None:
        jl.save_adapter(out, adapter, base=variables)
        print(f"the adapter is in {out}")
    return before, after


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a folder without text is a message and no traceback."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(optax.__file__).parent
    parser.add_argument("code", type=Path, nargs="?", default=default, help="a folder (Optax)")
    parser.add_argument("--model", type=Path, default=model_path(), help="a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, help="folder to save the adapter to")
    options = parser.parse_args(argv)
    try:
        run(options.code, options.model, options.steps, options.rank, options.out)
    except jl.errors.LoraError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
