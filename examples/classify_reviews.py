"""Fine-tune an encoder as a text classifier: LoRA in its layers, and a fully trained head.

    python examples/classify_reviews.py
    python examples/classify_reviews.py --model roberta-base/ --train train.tsv --dev dev.tsv

Without files, the example generates a small data set of reviews; without a model, it creates a
small random RoBERTa with a word-level tokenizer. This takes about 15 seconds on two CPU cores.
`--model` is a BERT or RoBERTa folder saved by `transformers` (masked language model or classifier)
with its tokenizer. Files are tab-separated as in GLUE: the first line names the columns, among them
`sentence` and `label`.

`--out` saves the adapter and the new head in PEFT format.
"""

import argparse
import functools
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl
from jax_lora.errors import DataError, LoraError
from jax_lora.models import Roberta, RobertaConfig, add_classifier, load

PROBLEMS_SHOWN = 10


# --- the files -----------------------------------------------------------------------------------


class Review(NamedTuple):
    """A labeled sentence."""

    sentence: str
    label: str


def read_tsv(path: Path) -> list[Review]:
    """Read a file of sentences and labels.

    Raises:
      DataError: The file cannot be read, or lines do not match the header; lists these lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(str(path), str(error), "a text file in UTF-8", "check the path.") from error
    columns = lines[0].split("\t") if lines else []
    if not {"sentence", "label"} <= set(columns):
        got, fix = (
            f"the columns {columns}",
            "name the columns in the first line, separated by tabs.",
        )
        raise _refusal(f"{path}:1", got, "columns named 'sentence' and 'label'", fix)
    reviews, problems = [], []
    for number, line in enumerate(lines[1:], start=2):
        values = line.split("\t")
        row = dict(zip(columns, map(str.strip, values), strict=False))
        if len(values) != len(columns):
            problems.append(f"{path}:{number}: {len(values)} columns instead of {len(columns)}")
        elif not row["sentence"] or not row["label"]:
            empty = "label" if row["sentence"] else "sentence"
            problems.append(f"{path}:{number}: no {empty}")
        else:
            reviews.append(Review(row["sentence"], row["label"]))
    _raise_if_any(path, problems, "a sentence and a label in every line")
    if not reviews:
        raise _refusal(
            str(path), "no examples after the header", "at least one example", "add examples."
        )
    return reviews


def label_names(reviews: Sequence[Review]) -> list[str]:
    """Return the labels: numbers in numerical order, then names in alphabetical order."""
    found = {review.label for review in reviews}
    numbers = sorted((label for label in found if label.isdecimal()), key=int)
    return numbers + sorted(found - set(numbers))


def check_labels(path: Path, reviews: Sequence[Review], labels: Sequence[str]) -> None:
    """Raise an error for labels that the training file does not contain."""
    wrong = {review.label for review in reviews} - set(labels)
    problems = [f"{path}: the label {label!r}" for label in sorted(wrong)]
    _raise_if_any(path, problems, "only the labels of the training file: " + ", ".join(labels))


def _raise_if_any(path: Path, problems: list[str], expected: str) -> None:
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        shown = problems[:PROBLEMS_SHOWN] + [f"and {more} more"] * (more > 0)
        fix = "correct or remove these lines."
        got = "\n    ".join(["invalid lines:", *shown])
        raise _refusal(str(path), got, expected, fix)


def _refusal(where: str, got: str, expected: str, fix: str) -> DataError:
    return DataError(where, got=got, expected=expected, fix=fix)


THINGS = "plot cast music ending script camera pace dialogue story humour".split()
PRAISE = "good great fine lovely clever moving fresh superb".split()
BLAME = "bad poor dull awful clumsy boring stale weak".split()
FORMS = ("the {} was {}", "i found the {} {}", "what a {} , so {}", "its {} is {}")


def write_reviews(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Generate reviews, half of them negated, and write a training file and a test file.

    No sentence is in both files.
    """
    every = []
    for form, thing, word in itertools.product(FORMS, THINGS, PRAISE + BLAME):
        for negated in (False, True):
            sentence = form.format(thing, f"not {word}" if negated else word)
            every.append(f"{sentence}\t{int((word in PRAISE) != negated)}\n")
    random.Random(seed).shuffle(every)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.tsv", folder / "dev.tsv"
    for path, rows in zip(paths, (every[256:], every[:256]), strict=True):
        path.write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")
    return paths


# --- tokens --------------------------------------------------------------------------------------


class Words:
    """A word-level tokenizer with the special token ids of RoBERTa."""

    bos_token_id, pad_token_id, eos_token_id, unk_token_id = 0, 1, 2, 3

    def __init__(self, sentences: Sequence[str]):
        """Build the vocabulary from sentences."""
        words = sorted({word for sentence in sentences for word in sentence.lower().split()})
        self.numbers = {word: number for number, word in enumerate(words, start=4)}

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self.numbers) + 4

    def __call__(self, sentence: str, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
        """Encode a sentence with the interface of a `transformers` tokenizer."""
        words = [self.numbers.get(word, self.unk_token_id) for word in sentence.lower().split()]
        kept = words[: max_length - 2] if truncation else words
        return {"input_ids": [self.bos_token_id, *kept, self.eos_token_id]}


class Batch(NamedTuple):
    """Padded examples; those that fill up the last batch have weight 0."""

    ids: np.ndarray  # (batch, tokens) int32
    mask: np.ndarray  # (batch, tokens) int32
    labels: np.ndarray  # (batch,) int32
    weights: np.ndarray  # (batch,) float32


class Examples:
    """Tokenized reviews."""

    def __init__(self, reviews: Sequence[Review], labels: Sequence[str], tokenizer: Any, most: int):
        """Encode reviews, truncated to `most` tokens."""
        encode = functools.partial(tokenizer, truncation=True, max_length=most)
        self.rows = [encode(review.sentence)["input_ids"] for review in reviews]
        self.labels = [labels.index(review.label) for review in reviews]
        self.pad, self.most = tokenizer.pad_token_id, most

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield batches in the given order; lengths are rounded up to limit recompilation."""
        order = range(len(self.rows)) if order is None else order
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            longest = max(len(self.rows[index]) for index in chosen)
            length = min(-(-longest // 16) * 16, self.most)
            ids = np.full((size, length), self.pad, np.int32)
            labels, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
            for row, index in enumerate(chosen):
                ids[row, : len(self.rows[index])] = self.rows[index]
                labels[row], weights[row] = self.labels[index], 1.0
            # Attention needs at least one unmasked token, in padding examples too.
            mask = (ids != self.pad).astype(np.int32)
            mask[len(chosen) :, 0] = 1
            yield Batch(ids, mask, labels, weights)


# --- model and training --------------------------------------------------------------------------


def make_model(words: int, width: int, layers: int, key: jax.Array) -> tuple[Any, dict[str, Any]]:
    """Create a small random RoBERTa."""
    config = RobertaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=34,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.1,
    )
    model = Roberta(config)
    return model, jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]


def accuracy(model: Any, variables: Any, examples: Examples, size: int) -> float:
    """Return the share of examples whose label has the highest score."""
    right = 0.0
    for batch in examples.batches(size):
        right += float(_right(model, variables, batch))
    return right / len(examples.rows)


@functools.partial(jax.jit, static_argnums=0)
def _right(model: Any, variables: Any, batch: Batch) -> jax.Array:
    scores = jl.lora_apply(model.apply)(variables, batch.ids, batch.mask)  # (batch, labels)
    return jnp.sum((jnp.argmax(scores, axis=-1) == batch.labels) * batch.weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(
    model: Any, optimizer: optax.GradientTransformation, variables: Any, state: Any, batch: Batch
) -> tuple[Any, Any, jax.Array]:
    """Run one training step, which changes the adapter only."""

    def loss(variables: Any) -> jax.Array:
        scores = jl.lora_apply(model.apply)(variables, batch.ids, batch.mask)  # (batch, labels)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            scores.astype(jnp.float32), batch.labels
        )
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

    value, gradients = jax.value_and_grad(loss)(variables)
    updates, state = optimizer.update(gradients, state, variables)
    return optax.apply_updates(variables, updates), state, value


def train(model: Any, variables: Any, examples: Examples, options: argparse.Namespace) -> Any:
    """Train for several epochs, with warmup and cosine decay of the learning rate."""
    steps = max(options.epochs * -(-len(examples.rows) // options.batch_size), 2)
    peak = options.rate or (5e-3 if options.model is None else 2e-4)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 10, 1), steps)
    optimizer = jl.masked_optimizer(optax.adamw(rate))
    state, shuffler = optimizer.init(variables), random.Random(options.seed)
    for epoch in range(options.epochs):
        order = shuffler.sample(range(len(examples.rows)), len(examples.rows))
        losses = []
        for batch in examples.batches(options.batch_size, order):
            variables, state, loss = train_step(model, optimizer, variables, state, batch)
            losses.append(loss)
        print(f"epoch {epoch + 1}: loss {np.mean(jax.device_get(losses)):.3f}")
    return variables


def adapt(model: Any, params: dict[str, Any], options: argparse.Namespace) -> Any:
    """Adapt every dense kernel of the encoder, and train the head fully."""
    variables = {"params": params}
    kernels = jl.find_kernels(model.apply, variables, jnp.zeros((2, 4), jnp.int32))
    heads = tuple(part for part in ("pooler", "classifier") if part in params)
    config = jl.LoraConfig(rank=options.rank, targets="all-linear", modules_to_save=heads)
    adapter = jl.lora_init(jax.random.key(options.seed), variables, config, kernels=kernels)
    return jl.combine(variables, adapter)


# --- the command ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> tuple[float, float]:
    """Run the example; return the accuracy before and after."""
    files = options.train, options.dev
    if files == (None, None):
        with tempfile.TemporaryDirectory() as folder:
            return run(argparse.Namespace(**{**vars(options), **_generated(Path(folder))}))
    if None in files:
        raise _refusal("--train, --dev", "only one of them", "both", "pass both files, or neither.")
    reviews, unseen = read_tsv(options.train), read_tsv(options.dev)
    labels = label_names(reviews)
    check_labels(options.dev, unseen, labels)
    key = jax.random.key(options.seed)
    if options.model is None:
        tokenizer: Any = Words([review.sentence for review in reviews])
        model, params = make_model(len(tokenizer), options.width, options.layers, key)
    else:
        from transformers import AutoTokenizer  # slow to import, and not always needed

        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        model, params = load(options.model, dtype=jnp.float32)
    model, params = add_classifier(jax.random.fold_in(key, 1), model, params, labels)
    most = model.config.max_position_embeddings - model.config.first_position
    most = min(most, options.max_length)
    training, test = (Examples(each, labels, tokenizer, most) for each in (reviews, unseen))
    variables = adapt(model, params, options)
    trained = sum(leaf.size for leaf in jax.tree.leaves(jl.partition(variables)[1]))
    print(f"{len(reviews)} examples, {len(labels)} classes, {trained:,} trainable parameters")
    before = accuracy(model, variables, test, options.batch_size)
    print(f"accuracy before: {before:.3f}")
    variables = train(model, variables, training, options)
    after = accuracy(model, variables, test, options.batch_size)
    print(f"accuracy after:  {after:.3f}")
    if options.out is not None:
        adapter = jl.partition(variables)[1]
        base = None if options.model is None else str(options.model)
        jl.peft.save(options.out, adapter, names=model.hf_names, base_model=base)
    return before, after


def _generated(folder: Path) -> dict[str, Path]:
    train_file, dev_file = write_reviews(folder)
    return {"train": train_file, "dev": dev_file}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="BERT or RoBERTa folder saved by transformers")
    parser.add_argument("--train", type=Path, help="training file (TSV)")
    parser.add_argument("--dev", type=Path, help="test file (TSV)")
    parser.add_argument("--out", type=Path, help="folder for the adapter, in PEFT format")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--rate", type=float, help="learning rate (default: 2e-4, or 5e-3 for the random model)"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128, help="maximum sequence length")
    parser.add_argument("--width", type=int, default=64, help="hidden size of the random model")
    parser.add_argument("--layers", type=int, default=2, help="layers of the random model")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the example; errors of the data end it with a message."""
    try:
        run(parse())
    except LoraError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
