"""Adapt a language model to a codebase, and compare its perplexity before and after.

    python examples/adapt_to_code.py
    python examples/adapt_to_code.py your/code --model path/to/hf_folder --steps 500 --out adapted
    jax-lora generate --adapter-path adapted --prompt "def update("

The default codebase is Optax. The bundled model was trained on Python's standard library and has
never seen it. A hash of its name decides whether a file is held out, which happens to one file in
ten, so adding or removing files does not move the others. The training files are packed into
sequences of a fixed length, in which files do not attend to each other. The example takes about 45
seconds on two CPU cores.

`jax-lora train --data your/code --pack` does the same with checkpoints and validation.
"""

import argparse
import dataclasses
import math
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.data.batches import Batches
from jax_lora.data.collators import Batch
from jax_lora.data.examples import make_examples
from jax_lora.data.rows import Row, RowFile
from jax_lora.data.text_folder import read_text_folder
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError, LoraError
from jax_lora.finetune.losses import causal_lm_loss
from jax_lora.finetune.run_folder import RunFolder

LENGTH, BATCH_SIZE = 256, 8  # tokens per sequence, sequences per batch
HOLD_OUT_ONE_IN = 10  # files
EVALUATED = 80_000  # bytes of held-out files used for evaluation


class Score(NamedTuple):
    """Perplexity, which is exp(loss per token), and the loss in bits per byte of text."""

    perplexity: float
    bits_per_byte: float


def split(code: Path) -> tuple[RowFile, RowFile]:
    """Read a folder of text files, and split it into training and held-out files.

    Raises:
      DataError: One of the two is empty.
    """
    texts = read_text_folder(code) if code.is_dir() else None
    rows = () if texts is None else texts.rows
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:  # the path within the folder
        sides[zlib.crc32(row.fields["file"].encode()) % HOLD_OUT_ONE_IN == 0].append(row)
    training, held_out = map(tuple, sides)
    if texts is None or not training or not held_out:
        got = f"{len(training)} training files and {len(held_out)} held-out files"
        expected = (
            f"a folder with both; one file in {HOLD_OUT_ONE_IN} is held out, by a hash of its name"
        )
        fix = "Check the path, or choose a folder with more text files."
        raise DataError(str(code), got=got, expected=expected, fix=fix)
    return dataclasses.replace(texts, rows=training), dataclasses.replace(texts, rows=held_out)


def sample_of(held_out: RowFile) -> tuple[RowFile, int]:
    """Return files of at most EVALUATED bytes in total, but at least one, and their bytes."""
    chosen, size = [], 0
    for row in held_out.rows:
        length = len(row.fields["text"].encode())
        if not chosen or size + length <= EVALUATED:
            chosen, size = [*chosen, row], size + length
    return dataclasses.replace(held_out, rows=tuple(chosen)), size


def packed(file: RowFile, tokenizer: Tokenizer, seed: int = 0) -> Batches:
    """Pack documents into sequences of LENGTH tokens."""
    examples = make_examples(file, tokenizer, max_length=LENGTH)
    return Batches.of(examples.rows, BATCH_SIZE, seed=seed, pack=LENGTH)


def make_loss(model: Any) -> Any:
    """Return `loss(adapter, variables, batch) -> (sum of token losses, number of tokens)`."""
    applied = jl.lora_apply(lambda variables, batch: causal_lm_loss(model, variables, batch))
    return jax.jit(lambda adapter, variables, batch: applied(jl.combine(variables, adapter), batch))


def score(loss: Any, adapter: jl.Adapter, variables: Any, unseen: Batches, size: int) -> Score:
    """Evaluate on held-out files, which have `size` bytes in total."""
    sums = [loss(adapter, variables, batch) for batch in unseen.once()]
    nats, tokens = (float(sum(column)) for column in zip(*sums, strict=True))
    return Score(math.exp(nats / tokens), nats / math.log(2) / size)


def train(loss: Any, adapter: jl.Adapter, variables: Any, batches: Batches, steps: int) -> Any:
    """Train the adapter; an epoch has `batches.per_epoch` steps."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, max(1, steps)))

    @jax.jit
    def step(adapter: jl.Adapter, state: Any, variables: Any, batch: Batch) -> Any:
        def mean(adapter: jl.Adapter) -> jax.Array:
            total, tokens = loss(adapter, variables, batch)
            return total / tokens

        updates, state = tx.update(jax.grad(mean)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    state = tx.init(adapter)
    for number in range(steps):
        adapter, state = step(adapter, state, variables, batches.at(number))
    return adapter


def run(
    code: Path, model_folder: Path, steps: int, rank: int, out: Path | None
) -> tuple[Score, Score]:
    """Train, report and save; return the scores before and after."""
    training, held_out = split(code)
    model, params = jl.models.load(model_folder, dtype="float32")
    variables, tokenizer = {"params": params}, Tokenizer.load(model_folder)
    sample, size = sample_of(held_out)
    batches, unseen = packed(training, tokenizer), packed(sample, tokenizer)
    print(
        f"{len(training.rows)} training files, {len(held_out.rows)} held out, from {code};", end=" "
    )
    print(f"{len(sample.rows)} of these are evaluated, {size:,} bytes")

    kernels = jl.find_kernels(model.apply, variables, jnp.zeros((1, LENGTH), jnp.int32))
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    summary = jl.summary(variables, adapter)
    share = summary.trainable / summary.total
    print(f"{summary.trainable:,} of {summary.total:,} parameters are trainable ({share:.1%})")

    loss = make_loss(model)
    before = score(loss, adapter, variables, unseen, size)
    adapter = train(loss, adapter, variables, batches, steps)
    after = score(loss, adapter, variables, unseen, size)
    for name, (perplexity, bits) in (("before", before), ("after", after)):
        print(f"{name:<7} perplexity {perplexity:8.2f}, {bits:.3f} bits per byte")
    if out is not None:  # a run folder like that of `jax-lora train`, for the other commands
        folder, _ = RunFolder.prepare(out)
        folder.write_config({"model": str(model_folder.absolute()), "dtype": "float32"})
        folder.save(steps, lambda path: jl.save_adapter(path, adapter, base=variables))
        print(f"try it: jax-lora generate --adapter-path {out} --prompt '...'")
    return before, after


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example; errors of the data end it with a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(optax.__file__).parent
    parser.add_argument(
        "code", type=Path, nargs="?", default=default, help="folder of code (default: Optax)"
    )
    parser.add_argument("--model", type=Path, default=model_path(), help="Hugging Face folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, help="folder to save the adapter to")
    options = parser.parse_args(argv)
    try:
        run(options.code, options.model, options.steps, options.rank, options.out)
    except LoraError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
