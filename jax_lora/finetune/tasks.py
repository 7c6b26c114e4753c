"""The tasks of the models: encoding of examples, batches, and loss of each.

causal-lm        decoders            prompts and completions, chats, texts
masked-lm        BERT, RoBERTa       texts
seq2seq          T5                  prompts and completions
classification   BERT, RoBERTa       texts, or pairs of texts, with labels
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_lora.data.batches import Batches
from jax_lora.data.collators import (
    ClassificationCollator,
    MaskedCollator,
    Seq2SeqCollator,
    collate_causal,
)
from jax_lora.data.encoder_examples import (
    classification_examples,
    find_labels,
    masked_lm_examples,
    seq2seq_examples,
)
from jax_lora.data.encoder_tokenizer import EncoderTokenizer
from jax_lora.data.examples import Examples, make_examples
from jax_lora.data.rows import RowFile
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError
from jax_lora.finetune.losses import (
    causal_lm_loss,
    classification_loss,
    masked_lm_loss,
    seq2seq_loss,
)
from jax_lora.finetune.process_group import process_group
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.state_sharding import placed_or_replicated
from jax_lora.finetune.step import LossFn
from jax_lora.finetune.trainable import Trainable, train_adapter
from jax_lora.init import lora_init
from jax_lora.models import T5, add_classifier, load, save
from jax_lora.models.encoder import CLASSIFICATION, MASKED_LM, Encoder
from jax_lora.models.families import family_of, family_of_config
from jax_lora.models.mesh_sharding import sharding_like
from jax_lora.models.model_kernels import model_kernels
from jax_lora.models.tokenizer_files import copy_companions
from jax_lora.quantize import is_quantized
from jax_lora.sharding import adapter_shardings

CAUSAL, MASKED, SEQ2SEQ, CLASSES = TASKS = "causal-lm", "masked-lm", "seq2seq", "classification"
# T5 has relative positions, and therefore no maximum sequence length.
NO_LIMIT = 1_000_000

LOSSES: dict[str, Callable[..., Any]] = {
    CAUSAL: causal_lm_loss,
    MASKED: masked_lm_loss,
    SEQ2SEQ: seq2seq_loss,
    CLASSES: classification_loss,
}


def choose_task(task: str, config: Any, file: RowFile | None = None) -> str:
    """Resolve the task "auto", and refuse a task that the architecture does not support.

    "auto" is decided by the architecture and, for encoders, by whether the examples have labels.

    Raises:
      ConfigError: The architecture does not support the task.
    """
    module = family_of_config(config).module
    if issubclass(module, Encoder):
        possible = (CLASSES, MASKED)
        rows = () if file is None else file.rows
        labeled = any(row.fields.get("label") is not None for row in rows)
        # Without examples, the head decides.
        labeled = labeled or (file is None and config.head == CLASSIFICATION)
        usual = CLASSES if labeled else MASKED
    else:
        usual = SEQ2SEQ if module is T5 else CAUSAL
        possible = (usual,)
    if task == "auto":
        return usual
    if task not in possible:
        raise ConfigError(
            "task",
            got=f"{task!r} for a {module.__name__}",
            expected=f"one of {', '.join(possible)}",
            fix='Use "auto", or another model.',
        )
    return task


def tokenizer_for(task: str, folder: Path, templates: Mapping[str, str | None]) -> Any:
    """Load a `Tokenizer` for causal-lm, or an `EncoderTokenizer` for the other tasks.

    `templates` are `chat_template` and `prompt_template`, as for `Tokenizer.load`.

    Raises:
      ConfigError: A template is given for another task than causal-lm.
    """
    if task == CAUSAL:
        return Tokenizer.load(folder, **templates)
    for name, text in templates.items():
        if text is not None:
            raise ConfigError(
                name, got=f"the task {task}", expected=f"the task {CAUSAL}", fix=f"Remove {name}."
            )
    tokenizer = EncoderTokenizer.load(folder)
    if task == MASKED:
        tokenizer.require_mask()
    return tokenizer


def longest_input(model: Any) -> int:
    """Return the maximum sequence length of a model."""
    config = model.config
    most = getattr(config, "max_position_embeddings", NO_LIMIT)
    return most - getattr(config, "first_position", 0)


def encode_examples(
    task: str, file: RowFile, model: Any, tokenizer: Any, settings: TrainSettings
) -> Examples:
    """Encode the examples of a split with a tokenizer from `tokenizer_for`.

    The settings have the maximum length, truncation, and the loss mask.
    """
    most = min(settings.max_seq_length, longest_input(model))
    cut: dict[str, Any] = {"max_length": most, "truncate": settings.truncate}
    if task == CLASSES:
        return classification_examples(file, tokenizer, model.config.labels, **cut)
    if task == MASKED:
        return masked_lm_examples(file, tokenizer, **cut)
    if task == SEQ2SEQ:
        return seq2seq_examples(file, tokenizer, eos_id=end_tokens(model)[0], **cut)
    return make_examples(
        file, tokenizer, mask_prompt=settings.mask_prompt, turns=settings.turns, **cut
    )


def make_batches(
    task: str, examples: Examples, model: Any, tokenizer: Any, rows: int, **options: Any
) -> Batches:
    """Create batches of examples from `encode_examples`; options as in `Batches.of`."""
    config, collate = model.config, collate_causal
    pad_id = config.pad_token_id or 0
    if task == CLASSES:
        collate = ClassificationCollator(pad_id, config.type_vocab_size)
    elif task == MASKED:
        types = config.type_vocab_size
        collate = MaskedCollator(tokenizer.mask_id, config.vocab_size, pad_id, types)
    elif task == SEQ2SEQ:
        collate = Seq2SeqCollator(config.decoder_start_token_id or 0, pad_id)
    return Batches.of(examples.rows, rows, collate=collate, **options)


def loss_for(task: str, model: Any, *, chunk: int | None = None, devices: int = 1) -> LossFn:
    """Bind a task's loss function to a model."""
    return functools.partial(LOSSES[task], model, chunk=chunk, devices=devices)


def end_tokens(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a completion; 1 if the configuration has none (T5)."""
    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, tuple) else (1 if ends is None else ends,)
    return ends or (1,)


# -----------------------------------------------------------------------------------------------
# Models
# -----------------------------------------------------------------------------------------------


def prepare_model(
    task: str, model: Any, params: Any, labels: tuple[str, ...] = (), *, seed: int = 0
) -> tuple[Any, Any, Any]:
    """Add the head of a task to a model.

    A classifier with the same labels keeps its head. Other encoders get a new classification head,
    which is zero in the base model; the adapter stores the trained head. Random values in the base
    model could differ between platforms by rounding, and its fingerprint would not match.

    Returns:
      The model, the parameters of the base model, and those at the start of training.

    Raises:
      ConfigError: The task is masked-lm, and the model has no head for it.
    """
    if task == CLASSES:
        config = model.config
        if config.head == CLASSIFICATION and labels in ((), config.labels):
            return model, params, params
        classifier, start = add_classifier(jax.random.key(seed), model, params, labels)
        return classifier, _zero_head(params, start), start
    if task == MASKED and model.config.head != MASKED_LM:
        raise ConfigError(
            "task",
            got=f"{task!r} for a model with the head {model.config.head!r}",
            expected=f"a model with the head {MASKED_LM!r}",
            fix="Use a masked language model, or examples with labels.",
        )
    return model, params, params


def _zero_head(before: Any, after: Any) -> Any:
    """Set the parameters of a new head to zero."""
    existing = {id(leaf) for leaf in jax.tree.leaves(before)}
    return jax.tree.map(lambda leaf: leaf if id(leaf) in existing else jnp.zeros_like(leaf), after)


def labels_for(model_config: Any, given: tuple[str, ...], file: RowFile) -> tuple[str, ...]:
    """Choose the classes: the given ones, the model's if they include the data's, or the data's."""
    if given:
        return given
    found = find_labels(file)
    if model_config.head == CLASSIFICATION and set(found) <= set(model_config.labels):
        return model_config.labels
    return found


def make_trainable(
    task: str,
    model: Any,
    variables: Any,
    settings: TrainSettings,
    *,
    start: Any = None,
    folder: Path | None = None,
    chat_template: str | None = None,
    mesh: Mesh | None = None,
) -> Trainable:
    """Select the trainable parameters: an adapter, or the whole model.

    Args:
      task: One of `TASKS`.
      model: A model of `jax_lora.models`.
      variables: `{"params": params}` of the base model.
      settings: The settings of the run.
      start: `variables` with the random values of a new head; None: `variables`.
      folder: The model's folder; its tokenizer is copied into every saved model.
      chat_template: Another chat template than the folder's, for every saved model.
      mesh: The mesh over which the variables are sharded; None: one device.
    """
    start = variables if start is None else start
    if mesh is not None:  # a new head is not there yet
        put = process_group().put
        variables, start = (
            put(tree, placed_or_replicated(tree, mesh)) for tree in (variables, start)
        )
    if settings.fine_tune_type == "full":
        if is_quantized(variables):
            raise ConfigError(
                "fine_tune_type",
                got="'full' for a model that is stored in NF4",
                expected="'lora' or 'dora': codes are not trained",
                fix="Use the model's original, or train an adapter.",
            )
        return _whole_model(model, start, folder, chat_template)
    kernels = model_kernels(model.apply, variables)
    # These parts of a classifier are trained in full, because they can be new.
    heads = ("pooler", "classifier") if task == CLASSES else ()
    heads = tuple(part for part in heads if part in variables["params"])
    config = settings.lora_config(depth_of(model), heads=heads)
    make = functools.partial(lora_init, config=config, kernels=kernels)
    key = jax.random.key(settings.seed)
    if mesh is None:
        return train_adapter(variables, make(key, start))
    shardings = adapter_shardings(variables, jax.eval_shape(make, key, start))
    return train_adapter(variables, jax.jit(make, out_shardings=shardings)(key, start))


def depth_of(model: Any) -> int:
    """Return the number of layers of a model; 0 for an encoder-decoder, which has two stacks."""
    name = family_of(model).depth
    return 0 if name is None else getattr(model.config, name)


def _whole_model(
    model: Any, variables: Any, source: Path | None, chat_template: str | None
) -> Trainable:
    dtype = jax.tree.leaves(variables)[0].dtype

    def write(folder: Path, trained: Any) -> None:
        save(folder, model, trained["params"])
        if source is not None:
            copy_companions(source, folder, chat_template)

    place = sharding_like(variables["params"])

    def read(folder: Path) -> Any:
        return {"params": load(folder, dtype=dtype, sharding=place)[1]}

    return Trainable({}, variables, lambda _, trained: trained, write, read, in_place=True)
