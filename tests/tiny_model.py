"""A tokenizer and a model small enough that a test compiles them in a second."""

import json

import jax
import jax.numpy as jnp
import pytest
import tokenizers

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.models import Llama, LlamaConfig

CORPUS = ["select name from books where year > 1990", "how many rows? count the rows\nsql:"] * 3


def write_tokenizer(folder, *, bos=None, post=True, template=None, pad=None, special=()):
    """A byte-level BPE; with `bos` and `post` it puts a start token in front by itself."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", *([bos] if bos else []), *special],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos and post:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "bos_token": bos, "pad_token": pad}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def tokenizer_with_bos(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path / "with_bos", bos="<|start|>"))


TINY = LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    eos_token_id=0,
    pad_token_id=0,
)


def random_params(model, seed=0):
    """Random parameters; one compiled function instead of one for every operation of `init`."""
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="session")
def tiny():
    """A random model and its variables."""
    model = Llama(TINY)
    params = random_params(model)
    # Larger weights than at the start of training, so that different prompts differ.
    return model, {"params": jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params)}
