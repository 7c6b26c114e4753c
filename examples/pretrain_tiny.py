"""Pre-train the bundled tiny Llama on the text of the Python standard library.

    python examples/pretrain_tiny.py --out OUT --steps 1200

This took 67 minutes on two shared CPU cores and reached a validation loss of 2.25 nats per token.

The text comes with Python: the source files of the standard library, including its tests but not
generated tables and vendored packages, and the language reference in `pydoc_data`. The script first
trains a byte-level BPE tokenizer with 4096 tokens, then a Llama with about 4.3 million parameters:
Muon for 2-D kernels, Adam for the rest, cosine decay to zero, and sequences of 256 tokens, or of
512 for the last tenth of the steps. Files whose path has a CRC-32 of 0 modulo 50 are held out for
validation.

A share of the sequences (DRILLS) teaches the model to copy from its context, which a small model
learns slowly from plain text. They are made from the text: a repeated passage; a list of names
followed by parts of it in another order; pairs of names, repeated in another order. In lists and
pairs, the loss only includes tokens that the context determines.

The result depends only on the Python version, the package versions, the number of steps and the
arithmetic of the machine. The output is a complete Hugging Face folder, and `state.npz` for
`--resume`.
"""

import argparse
import json
import os
import random
import re
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Shard the batch over two devices; XLA for CPU would leave the second core idle otherwise.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax  # noqa: E402  the line above must come first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from jax_lora.models import Llama, LlamaConfig, save  # noqa: E402

END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 4096
SEED = 0
DRILLS = 0.3  # share of the sequences that teach copying
LONG_SHARE = 0.1  # share of the steps with sequences of twice the length
TOKENS_PER_STEP = 24 * 256
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=448,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    eos_token_id=0,
    pad_token_id=1,
)
# Words, single digits, runs of punctuation, whitespace. A leading space belongs to its word.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SKIPPED = re.compile(
    r"(site-packages|idlelib|ensurepip|__pycache__|lib2to3/tests/data|pydoc_data|config-)"
    r"|encodings/(cp|iso|mac|koi|tis|hp|ptcp|kz|palmos|big5|euc|gb|jis|shift)"
    r"|(test/bad|testclinic|_pydecimal|turtledemo|sre_constants|html/entities|keycert)"
)


# --- the text ------------------------------------------------------------------------------------


def documents() -> dict[str, str]:
    """Return path within the standard library -> text, sorted by path."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    found = {f"topics/{name}": text for name, text in topics.items()}
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        if not SKIPPED.search(name):
            text = file.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
            if len(text) > 200 and not _is_table(text):
                found[name] = text
    return dict(sorted(found.items()))


def _is_table(text: str) -> bool:
    """Return whether more than a sixth of the text are digits and backslashes."""
    return sum(c.isdigit() or c == "\\" for c in text) > len(text) / 6


def held_out(name: str) -> bool:
    """Return whether a document is held out for validation."""
    return zlib.crc32(name.encode()) % 50 == 0


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer, with single digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `tokenizers` and `transformers` read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


# --- sequences -----------------------------------------------------------------------------------


def text_rows(tokenizer: Tokenizer, texts: list[str], length: int) -> np.ndarray:
    """Concatenate documents and cut them into (rows, length); neighbors share one token."""
    encoded = tokenizer.encode_batch_fast(texts)
    joined = np.concatenate([np.array([0, *e.ids], np.uint16) for e in encoded])
    count = (len(joined) - 1) // (length - 1)
    return np.stack([joined[i * (length - 1) :][:length] for i in range(count)])


def drill_row(
    tokenizer: Tokenizer, texts: list[str], length: int, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a copying sequence (length,), and a mask of the tokens that its context determines."""
    draw = random.Random(key)
    ids, known = [0], [0]
    while len(ids) < length:
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - 2000))
        make = draw.choice((_repeated, _reordered, _paired))
        for piece, weight in make(draw, text[start : start + 2000], length):
            new = tokenizer.encode(piece).ids
            ids += new
            known += [weight] * len(new)
    return np.array(ids[:length], np.uint16), np.array(known[:length], np.uint8)


def _repeated(draw: random.Random, text: str, length: int) -> list[tuple[str, int]]:
    passage = text[: draw.randrange(20, length)]
    return [(passage + "\n", 1), *[(passage + "\n", 1)] * draw.randrange(1, 4)]


def _names(draw: random.Random, text: str, most: int) -> list[str]:
    names = sorted(set(re.findall(r"[A-Za-z_]{3,16}", text)))
    return draw.sample(names, min(len(names), draw.randrange(3, most)))


def _reordered(draw: random.Random, text: str, length: int) -> list[tuple[str, int]]:
    names = _names(draw, text, 12)
    join = draw.choice((", ", " ", "\n"))
    pieces = [(join.join(names) + "\n", 0)]
    for _ in range(draw.randrange(1, 4)):
        some = draw.sample(names, draw.randrange(min(2, len(names)), len(names) + 1))
        pieces.append((join.join(some) + "\n", 1))
    return pieces


def _paired(draw: random.Random, text: str, length: int) -> list[tuple[str, int]]:
    names = _names(draw, text, 17)
    pairs = list(zip(names[::2], names[1::2], strict=False))
    sign, end = draw.choice((" = ", ": ", " -> ")), draw.choice((", ", "\n"))
    pieces = []
    for round_ in range(draw.randrange(2, 4)):
        for key, value in pairs:
            pieces += [(key + sign, 0), (value + end, int(round_ > 0))]
        draw.shuffle(pairs)
    return pieces


class Rows:
    """The batch of every step: (batch, length) tokens and loss mask."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str], length: int):
        """Tokenize all texts; drills are generated when needed."""
        self.tokenizer, self.texts, self.length = tokenizer, texts, length
        self.text = text_rows(tokenizer, texts, length)
        self.order = np.random.default_rng(SEED).permutation(len(self.text))

    def batch(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the batch of a step: drills first, then text, each sequence once per epoch."""
        drills = round(size * DRILLS)
        rows = [self._drill(step * size + i) for i in range(drills)]
        first = step * (size - drills)
        for i in range(first, first + size - drills):
            row = self.text[self.order[i % len(self.order)]]
            rows.append((row, np.ones_like(row, np.uint8)))
        ids, known = (np.stack(part) for part in zip(*rows, strict=True))
        return ids.astype(np.int32), known.astype(np.float32)

    def _drill(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        return drill_row(self.tokenizer, self.texts, self.length, key)


# --- training ------------------------------------------------------------------------------------


def loss(params: Any, ids: jax.Array, known: jax.Array) -> tuple[jax.Array, Any]:
    """Return sums over a (batch, length) batch: cross-entropy, weights, correct predictions."""
    model = Llama(CONFIG)
    logits: Any = model.apply({"params": params}, ids[:, :-1])
    logits = logits.reshape(-1, VOCABULARY)  # (tokens, vocabulary)
    labels, weights = ids[:, 1:].reshape(-1), known[:, 1:].reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    return jnp.vdot(losses, weights), (weights.sum(), jnp.vdot(right, weights))


def make_optimizer(params: Any, steps: int) -> optax.GradientTransformation:
    """Create the optimizer: Muon for the kernels of the layers, Adam for the rest."""

    def decay(peak: float):
        return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 30), steps, 0.0)

    axes = jax.tree.map(
        lambda p: optax.contrib.MuonDimensionNumbers((1,), (2,)) if p.ndim == 3 else None, params
    )
    muon = optax.contrib.muon(
        decay(0.02),
        adam_learning_rate=decay(4e-3),
        adam_b2=0.95,
        weight_decay=0.01,
        muon_weight_dimension_numbers=axes,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def make_step(optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> Callable:
    """Return the jitted step: data parallel, with Muon sharded over the layers."""
    split, whole = PartitionSpec("data"), PartitionSpec()

    def gradient(params: Any, ids: jax.Array, known: jax.Array) -> tuple[jax.Array, Any]:
        (total, (weight, _)), grads = jax.value_and_grad(loss, has_aux=True)(params, ids, known)
        weight = jax.lax.psum(weight, "data")
        grads = jax.tree.map(lambda g: jax.lax.psum(g, "data") / weight, grads)
        return jax.lax.psum(total, "data") / weight, grads

    sharded = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=(whole, whole),
        check_vma=False,
    )

    def spread(tree: Any) -> Any:
        def put(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(mesh, split if x.ndim == 3 else whole)
            )

        return jax.tree.map(put, tree)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: jax.Array, known: jax.Array) -> Any:
        value, grads = sharded(params, ids, known)
        updates, state = optimizer.update(spread(grads), spread(state), params)
        params = optax.apply_updates(params, updates)
        keep = NamedSharding(mesh, whole)
        params = jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, keep), params)
        return params, spread(state), value

    return step


def evaluate(params: Any, ids: np.ndarray, known: np.ndarray) -> tuple[float, float]:
    """Return mean loss and accuracy over the tokens in the loss mask."""
    total = weight = right = 0.0
    for start in range(0, len(ids), 16):
        t, (w, r) = _measure(params, ids[start : start + 16], known[start : start + 16])
        total, weight, right = total + float(t), weight + float(w), right + float(r)
    return total / weight, right / weight


_measure = jax.jit(loss)


# --- the training run ----------------------------------------------------------------------------


def save_state(folder: Path, step: int, tree: Any) -> None:
    """Save the state for `--resume`, atomically."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    part = folder / "state.part.npz"
    np.savez(part, step, *leaves)
    part.replace(folder / "state.npz")


def load_state(folder: Path, tree: Any) -> tuple[int, Any]:
    """Load the step to resume from, and the tree."""
    with np.load(folder / "state.npz", allow_pickle=False) as stored:
        step, *leaves = (stored[f"arr_{i}"] for i in range(len(stored.files)))
    return int(step), jax.tree.unflatten(jax.tree.structure(tree), leaves)


def publish(folder: Path, params: Any) -> None:
    """Save the model in Hugging Face format, in bfloat16."""
    small = jax.tree.map(lambda p: p.astype(jnp.bfloat16), jax.device_get(params))
    save(folder, Llama(CONFIG), small)


def main() -> None:
    """Train, and print the loss every 20 steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--snapshot-every", type=int, default=150, help="steps between snapshots")
    parser.add_argument("--resume", action="store_true", help="resume from OUT/state.npz")
    options = parser.parse_args()
    started = time.time()

    texts = documents()
    training = [text for name, text in texts.items() if not held_out(name)]
    unseen = [text for name, text in texts.items() if held_out(name)]
    tokenizer = train_tokenizer(training)
    save_tokenizer(tokenizer, options.out)
    short, long = Rows(tokenizer, training, 257), Rows(tokenizer, training, 513)
    size = short.text.size / 1e6
    print(
        f"python {sys.version.split()[0]}: {len(training)} documents, {size:.2f}M tokens; ", end=""
    )
    print(f"{len(unseen)} held out; set-up {time.time() - started:.0f} s", flush=True)

    plain = text_rows(tokenizer, unseen, 257)
    plain = plain[:: max(1, len(plain) // 64)][:64].astype(np.int32)
    drills = [drill_row(tokenizer, unseen, 257, -1 - i) for i in range(32)]
    copy_ids, copy_known = (np.stack(part) for part in zip(*drills, strict=True))
    copy_ids, copy_known = copy_ids.astype(np.int32), copy_known.astype(np.float32)

    devices = jax.devices()[:2]  # Muon is sharded over the six layers, which two divides
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    params = Llama(CONFIG).init(jax.random.key(SEED), jnp.zeros((1, 8), jnp.int32))["params"]
    optimizer = make_optimizer(params, options.steps)
    tree, first = (params, optimizer.init(params)), 0
    if options.resume:
        first, tree = load_state(options.out, tree)
    params, state = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    update = make_step(optimizer, mesh)
    split = NamedSharding(mesh, PartitionSpec("data"))
    turn = round(options.steps * (1 - LONG_SHARE))  # step at which the longer sequences start

    for step in range(first, options.steps):
        rows = short if step < turn else long
        ids, known = rows.batch(step, TOKENS_PER_STEP // (rows.length - 1))
        params, state, value = update(params, state, *jax.device_put((ids, known), split))
        done = step + 1
        if done % 20 == 0 or done == 1:
            seconds = time.time() - started
            print(f"step {done} loss {float(value):.3f} seconds {seconds:.0f}", flush=True)
        if done % options.snapshot_every == 0 or done == options.steps:
            text_loss, _ = evaluate(params, plain, np.ones_like(plain, np.float32))
            copy_loss, copied = evaluate(params, copy_ids, copy_known)
            print(f"step {done} validation loss {text_loss:.4f}; copying drills: ", end="")
            print(f"loss {copy_loss:.4f}, accuracy {copied:.1%}", flush=True)
            publish(options.out, params)
            save_state(options.out, done, (params, state))
    print(f"done in {(time.time() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
