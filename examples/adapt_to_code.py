"""Adapt a language model to a codebase: perplexity on held-out files, before and after.

    python examples/adapt_to_code.py
    python examples/adapt_to_code.py your/code --model path/to/hf_folder --steps 500 --out adapted
    jax-lora generate --adapter-path adapted --prompt "def update("

Without a folder the code is that of Optax, which the bundled model has never seen: it was trained
on Python's standard library. One file in ten is held out, whole, chosen by a hash of its name: a
file stays on its side whatever else is added or removed. The others are packed into rows of a fixed
length; a row may hold several files, and none of them sees another. 45 seconds on two CPU cores.

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
from jax_lora.data.batches import Batch, Batches
from jax_lora.data.examples import make_examples
from jax_lora.data.rows import Row, RowFile
from jax_lora.data.text_folder import read_text_folder
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError, LoraError, format_error
from jax_lora.finetune.loss import summed_loss
from jax_lora.finetune.run_folder import RunFolder

LENGTH, ROWS = 256, 8  # tokens of a row, rows of a batch
SHARE = 10  # one file in so many is held out
MEASURED = 80_000  # bytes of held-out files that are measured: enough, and soon done


class Score(NamedTuple):
    """How well text is predicted: e to the loss of a token, and bits for each byte of it."""

    perplexity: float
    bits_per_byte: float


def split(code: Path) -> tuple[RowFile, RowFile]:
    """Read a folder of text files into those to learn and those held out, a document a file.

    Raises:
      DataError: There is no file for one of the two.
    """
    texts = read_text_folder(code) if code.is_dir() else None
    rows = () if texts is None else texts.rows
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:  # a name is the path in the folder
        sides[zlib.crc32(row.fields["file"].encode()) % SHARE == 0].append(row)
    learned, held_out = map(tuple, sides)
    if texts is None or not learned or not held_out:
        got = f"{len(learned)} text files to learn and {len(held_out)} to hold out"
        expected = f"a folder with some of both: a file in {SHARE} is held out, by its name's hash"
        fix = "Check the path, or give a folder with more files."
        raise DataError(format_error(str(code), got=got, expected=expected, fix=fix))
    return dataclasses.replace(texts, rows=learned), dataclasses.replace(texts, rows=held_out)


def measured(held_out: RowFile) -> tuple[RowFile, int]:
    """Take whole files while they fit into MEASURED bytes, one at least; return bytes too."""
    chosen, size = [], 0
    for row in held_out.rows:
        length = len(row.fields["text"].encode())
        if not chosen or size + length <= MEASURED:
            chosen, size = [*chosen, row], size + length
    return dataclasses.replace(held_out, rows=tuple(chosen)), size


def packed(file: RowFile, tokenizer: Tokenizer, seed: int = 0) -> Batches:
    """Cut documents into rows of LENGTH tokens, short ones several to a row."""
    examples = make_examples(file, tokenizer, max_length=LENGTH)
    return Batches.of(examples.rows, ROWS, seed=seed, pack=LENGTH)


def make_loss(model: Any) -> Any:
    """Make `loss(adapter, variables, batch) -> (sum over the batch's tokens, how many)`."""
    applied = jl.lora_apply(lambda variables, batch: summed_loss(model, variables, batch))
    return jax.jit(lambda adapter, variables, batch: applied(jl.combine(variables, adapter), batch))


def score(loss: Any, adapter: jl.Adapter, variables: Any, unseen: Batches, size: int) -> Score:
    """Measure on files of so many bytes together, every token once."""
    sums = [loss(adapter, variables, batch) for batch in unseen.once()]
    nats, tokens = (float(sum(column)) for column in zip(*sums, strict=True))
    return Score(math.exp(nats / tokens), nats / math.log(2) / size)


def train(loss: Any, adapter: jl.Adapter, variables: Any, batches: Batches, steps: int) -> Any:
    """Train the adapter; a pass over all files is `batches.per_epoch` steps."""
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
    """Adapt, report, save; return the scores before and after."""
    learned, held_out = split(code)
    model, params = jl.models.load(model_folder, dtype="float32")
    variables, tokenizer = {"params": params}, Tokenizer.load(model_folder)
    sample, size = measured(held_out)
    batches, unseen = packed(learned, tokenizer), packed(sample, tokenizer)
    print(
        f"{len(learned.rows)} files to learn, {len(held_out.rows)} held out, from {code};", end=" "
    )
    print(f"{len(sample.rows)} of these are measured, {size:,} bytes")

    kernels = jl.find_kernels(model.apply, variables, jnp.zeros((1, LENGTH), jnp.int32))
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    summary = jl.summary(variables, adapter)
    share = summary.trainable / summary.total
    print(f"{summary.trainable:,} of {summary.total:,} parameters are trained, {share:.1%}")

    loss = make_loss(model)
    before = score(loss, adapter, variables, unseen, size)
    adapter = train(loss, adapter, variables, batches, steps)
    after = score(loss, adapter, variables, unseen, size)
    for name, (perplexity, bits) in (("before", before), ("after", after)):
        print(f"{name:<7} perplexity {perplexity:8.2f}, {bits:.3f} bits a byte")
    if out is not None:  # as `jax-lora train` leaves it, so that other verbs find model and type
        folder, _ = RunFolder.prepare(out)
        folder.write_config({"model": str(model_folder.absolute()), "dtype": "float32"})
        folder.save(steps, lambda path: jl.save_adapter(path, adapter, base=variables))
        print(f"jax-lora generate --adapter-path {out} --prompt '...' uses it")
    return before, after


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a folder without text is a message and no traceback."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(optax.__file__).parent
    parser.add_argument("code", type=Path, nargs="?", default=default, help="a folder (Optax)")
    parser.add_argument("--model", type=Path, default=model_path(), help="a Hugging Face folder")
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
