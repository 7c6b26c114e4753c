"""Generation: continue prompts token by token, with a KV cache.

One compiled function, `advance`, serves a batch of one shape: its first call fills the cache with
the prompts, and every call adds tokens until a given number is written or all sequences have
ended. Between two calls the cache stays on the device, and the host can read the new tokens.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.adapter import is_adapted
from jax_lora.errors import ConfigError
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.decoder_inputs import KVCache
from jax_lora.models.sampling import Choice, draw
from jax_lora.transform import lora_apply
from jax_lora.transform.low_memory_jit import low_memory_jit


class Progress(NamedTuple):
    """The state of a batch that is being generated."""

    written: jax.Array  # int32 scalar, number of columns of `tokens` that hold a token
    done: jax.Array  # (batch,) booleans, whether a sequence has ended
    lengths: jax.Array  # (batch,) int32, new tokens of each sequence, its end token included
    tokens: jax.Array  # (batch, max_new_tokens) int32, padded after a sequence's end
    cache: KVCache  # of prompts and new tokens, except the last


def generate(
    model: Any,
    params: Mapping[str, Any],
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    eos_id: int | Iterable[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continue prompts, with any decoder of `jax_lora.models`.

    Each shape of `input_ids` and each `max_new_tokens` compiles one function (two, if you use both
    sampling and greedy decoding); other values never recompile. Pad prompts to a few lengths.

    Args:
      model: The decoder.
      params: Its parameters, with or without the "params" level. Leaves may carry an adapter, as
        `combine` returns them; merging it first (`merge`) makes every step faster.
      input_ids: (batch, prompt) integers; prompts of unequal lengths are padded on the left.
      attention_mask: (batch, prompt), 1 at real tokens and 0 at padding. None: no padding.
      max_new_tokens: Maximum number of new tokens per sequence.
      eos_id: The token or tokens that end a sequence. None: the configuration's; `()`: no token.
      temperature: Divides the logits; 0: greedy decoding.
      top_k: Sample from the k most likely tokens only.
      top_p: Sample from the smallest set of tokens whose probabilities sum to at least this.
      key: A key, or (batch,) keys, for sampling. A sequence's samples do not depend on the other
        sequences of the batch or on its padding.

    Returns:
      `(ids, lengths)`: ids (batch, prompt + max_new_tokens), with the configuration's padding
      token after each sequence's end (its end token, if there is no padding token); lengths
      (batch,), the number of new tokens of each sequence, its end token included.

    Raises:
      ConfigError: If a value is out of range, sampling has no key, a prompt is padded on the
        right, the model is not a decoder, or its table of positions is too short.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> config = jl.models.LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                                num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = jl.models.Llama(config), jnp.array([[0, 3], [1, 4]])
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> mask = jnp.array([[0, 1], [1, 1]])
      >>> ids, lengths = generate(model, params, ids, mask, max_new_tokens=3)
      >>> ids.shape, lengths.tolist()
      ((2, 5), [3, 3])
    """
    ids, mask = _check_prompts(input_ids, attention_mask)
    most = _integer("max_new_tokens", max_new_tokens)
    variables = params if "params" in params else {"params": params}
    progress = begin(model, variables, ids.shape, most)  # raises unless it is a decoder
    _check_room(model, mask, most)
    ends = _end_ids(model.config.eos_token_id if eos_id is None else eos_id)
    choice = make_choice(key, len(ids), temperature=temperature, top_k=top_k, top_p=top_p)
    progress = advance(
        model,
        variables,
        ids,
        mask,
        progress,
        np.int32(most),
        end_mask(model, ends),
        _padding(model, ends),
        choice,
    )
    return jnp.concatenate([jnp.asarray(ids), progress.tokens], axis=1), progress.lengths


def begin(model: Any, variables: Any, shape: tuple[int, ...], most: int) -> Progress:
    """Allocate the state of a batch, of shape (batch, prompt), with an empty cache.

    Raises:
      ConfigError: If the model has no KV cache, or is an encoder-decoder (T5).
    """
    batch, length = shape
    leaves = jax.tree.leaves(variables, is_leaf=is_adapted)
    leaves = [leaf.base if is_adapted(leaf) else leaf for leaf in leaves]
    dtype = next(leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    zeros = jnp.zeros((batch,), jnp.int32)
    tokens = jnp.zeros((batch, most), jnp.int32)
    make = getattr(model, "init_cache", lambda *sizes: None)
    cache = make(batch, length + most, dtype)
    if not isinstance(cache, KVCache):
        got, fix = type(model).__name__, "load a model whose class ends in ForCausalLM."
        _refuse("model", got, "a decoder, which has a cache", fix)
    return _placed(leaves, Progress(jnp.int32(0), zeros > 0, zeros, tokens, cache))


def _placed(leaves: list[Any], progress: Progress) -> Progress:
    """Commit the new arrays to the devices that the weights are committed to, if they are.

    `advance` returns committed arrays, so otherwise its second call would be compiled again.
    """
    arrays = jax.tree.leaves(leaves)
    real = [each for each in arrays if isinstance(each, jax.Array) and not isinstance(each, Tracer)]
    where = next((each.sharding for each in real if each.committed), None)
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    return progress if where is None else jax.device_put(progress, where)


@functools.partial(low_memory_jit, static_argnames="model", donate_argnames="progress")
def advance(
    model: Any,
    variables: Any,  # `{"params": params}`, with or without an adapter
    ids: jax.Array,  # (batch, prompt) int32, padded on the left
    mask: jax.Array,  # (batch, prompt) int32
    progress: Progress,  # from `begin` or an earlier call; its buffers are donated
    until: jax.Array,  # int32 scalar, at most the number of columns of `progress.tokens`
    ends: jax.Array,  # (vocabulary,) booleans, the tokens that end a sequence
    padding: jax.Array,  # int32 scalar, the token after a sequence's end
    choice: Choice | None,  # settings of sampling; None: greedy decoding
) -> Progress:
    """Write tokens until there are `until` of them, or all sequences have ended.

    Returns:
      The new state.
    """
    apply = lora_apply(model.apply)
    new = jnp.ones(progress.tokens.shape, mask.dtype)
    mask = jnp.concatenate([mask, new], axis=1)  # (batch, cache length)

    def step(tokens: jax.Array, now: Progress) -> Progress:
        """Add one token; tokens: (batch, n), those that are not in the cache yet."""
        hidden, cache = apply(
            variables, tokens, attention_mask=mask, cache=now.cache, return_hidden=True
        )
        logits = apply(variables, hidden[:, -1], method="unembed")  # (batch, vocabulary)
        if choice is None:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (batch,)
        else:
            token = draw(logits, choice, now.written)
        token = jnp.where(now.done, padding, token)
        return Progress(
            now.written + 1,
            now.done | ends[token],
            now.lengths + (~now.done).astype(jnp.int32),
            jax.lax.dynamic_update_slice(now.tokens, token[:, None], (jnp.int32(0), now.written)),
            cache,
        )

    def running(now: Progress) -> jax.Array:
        return (now.written < until) & ~now.done.all()

    def add(now: Progress) -> Progress:
        return step(jax.lax.dynamic_slice_in_dim(now.tokens, now.written - 1, 1, axis=1), now)

    # A condition, so that the first call and later ones share one compiled function.
    first = progress.written == 0
    progress = jax.lax.cond(first, functools.partial(step, ids), lambda now: now, progress)
    return jax.lax.while_loop(running, add, progress)


def make_choice(
    key: jax.Array | None,
    batch: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Choice | None:
    """Check the settings of sampling, as in `generate`, and make arrays of them; None: greedy.

    Raises:
      ConfigError: If a value is out of range, or there is no key.
    """
    if not 0 <= temperature < float("inf"):
        _refuse("temperature", temperature, "a number of at least 0", "0 does not sample.")
    most = np.iinfo(np.int32).max  # larger than every vocabulary: all tokens are kept
    k = most if top_k is None else min(_integer("top_k", top_k), most)
    if top_p is not None and not 0 < top_p <= 1:
        _refuse("top_p", top_p, "a number above 0 and at most 1", "1 keeps all tokens.")
    if temperature == 0:
        return None
    if key is None:
        _refuse("key", None, "a key, as temperature is above 0", "pass key=jax.random.key(0).")
    p = 1.0 if top_p is None else top_p
    return Choice(
        _sequence_keys(key, batch), jnp.float32(temperature), jnp.int32(k), jnp.float32(p)
    )


def _sequence_keys(key: jax.Array, batch: int) -> jax.Array:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        expected = f"one key, or {batch} of them"
        _refuse("key", f"keys {key.shape}", expected, "give each sequence one.")
    return key


def end_mask(model: Any, ids: Iterable[int]) -> np.ndarray:
    """Mark the tokens that end a sequence, in (vocabulary,) booleans.

    Raises:
      ConfigError: If a token is not in the vocabulary.
    """
    size = model.config.vocab_size
    ends = np.zeros(size, bool)
    for index in ids:
        if not 0 <= index < size:
            _refuse("eos_id", index, f"a token, 0 to {size - 1}", "check the tokenizer's ids.")
        ends[index] = True
    return ends


def _end_ids(ids: int | Iterable[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, Iterable) else (ids,)


def _padding(model: Any, ends: tuple[int, ...]) -> np.int32:
    padding = model.config.pad_token_id
    return np.int32(padding if padding is not None else ends[0] if ends else 0)


def _check_prompts(ids: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        got = f"{ids.dtype} {ids.shape}"
        _refuse("input_ids", got, "integers (batch, prompt)", "add a batch axis: ids[None].")
    mask = np.ones(ids.shape, np.int32) if mask is None else np.asarray(mask)
    if mask.shape != ids.shape:
        _refuse("attention_mask", mask.shape, f"shape {ids.shape}", "give one integer per token.")
    if not mask[:, -1].all():
        rows = np.flatnonzero(mask[:, -1] == 0)[:5].tolist()
        got, fix = f"padding at the end of prompts {rows}", "pad prompts on the left."
        _refuse("attention_mask", got, "real tokens in the last column", fix)
    return ids.astype(np.int32), mask.astype(np.int32)


def _check_room(model: Any, mask: np.ndarray, most: int) -> None:
    """Raise if a sequence would be longer than the table of learned positions."""
    if isinstance(model.config, DecoderConfig):  # rotary positions have no limit
        return
    length, table = int(mask.sum(axis=1).max()), model.config.max_position_embeddings
    if length + most - 1 > table:  # the last token is not an input
        got, fix = f"{length} + {most} tokens", "shorten the prompts, or add fewer tokens."
        _refuse("max_new_tokens", got, f"no more than the model's {table} positions", fix)


def _integer(where: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        _refuse(where, value, "an integer of at least 1", f"give another {where}.")
    return number


def _refuse(where: str, got: Any, expected: str, fix: str) -> NoReturn:
    raise ConfigError(f"generate: {where}", got=str(got), expected=expected, fix=fix)
