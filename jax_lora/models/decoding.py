"""Going on from prompts, token by token, with a cache of keys and values.

A batch of one shape runs one compiled program, `advance`: its first call fills the cache with the
prompts, and every call adds tokens until it is told to pause, or all rows have ended. Between two
calls the cache stays on the device, and the host can look at what has been written.
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
from jax_lora.errors import ConfigError, format_error
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.decoder_inputs import KVCache
from jax_lora.models.sampling import Choice, draw
from jax_lora.transform import lora_apply

__all__ = ["Progress", "advance", "begin", "end_mask", "generate", "make_choice"]


class Progress(NamedTuple):
    """Where a batch stands.

    Attributes:
      written: int32 scalar, how many columns of `tokens` hold a token.
      done: (rows,) booleans, whether a row has ended.
      lengths: (rows,) int32, how many tokens of a row count, its end token among them.
      tokens: (rows, most) int32, the new tokens; the padding token behind a row's end.
      cache: What the model has seen: prompts and new tokens but the last.
    """

    written: jax.Array
    done: jax.Array
    lengths: jax.Array
    tokens: jax.Array
    cache: KVCache


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
    """Go on from prompts, with any decoder of `jax_lora.models`.

    Each shape of `input_ids` and each `max_new_tokens` compiles one program (two, if you both
    sample and take the likeliest token); all else is data. Pad prompts to a few lengths.

    Args:
      model: The decoder.
      params: Its parameters, with or without the "params" level. Leaves may carry an adapter, as
        `combine` gives them; merging it first (`merge`) saves its work in every step.
      input_ids: (batch, prompt) integers; prompts of unequal lengths are padded on the left.
      attention_mask: (batch, prompt), 1 at real tokens and 0 at padding. None: no padding.
      max_new_tokens: Most tokens to add.
      eos_id: The token or tokens that end a row; None takes the configuration's own, `()` none.
      temperature: Divides the logits; 0 takes the likeliest token.
      top_k: Draw among the k likeliest tokens only.
      top_p: Draw among the fewest tokens only that together are this likely.
      key: A key for drawing, or (batch,) keys, one a row. What a row draws depends on neither the
        rows beside it nor its padding.

    Returns:
      `(ids, lengths)`: ids (batch, prompt + max_new_tokens), the configuration's padding token
      behind each row's end (its end token, if there is no padding token); lengths (batch,), how
      many new tokens each row has, its end token among them.

    Raises:
      ConfigError: A number is out of its range, sampling has no key, a row is padded on the right,
        the model is no decoder, or its table of positions is too short.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> config = jl.models.LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                                num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = jl.models.Llama(config), jnp.array([[0, 3], [1, 4]])
      >>> params = model.init(jax.random.key(0), ids)["params"]
      >>> mask = jnp.array([[0, 1], [1, 1]])
      >>> ids, lengths = generate(model, params, ids, mask, max_new_tokens=3)
      >>> ids.shape, lengths.tolist()
      ((2, 5), [3, 3])
    """
    ids, mask = _check_prompts(input_ids, attention_mask)
    most = _integer("max_new_tokens", max_new_tokens)
    variables = params if "params" in params else {"params": params}
    progress = begin(model, variables, ids.shape, most)  # only a decoder can
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
    """Make room for prompts and answers.

    Args:
      model: The decoder.
      variables: `{"params": params}`, adapted or not.
      shape: (rows, prompt).
      most: Most new tokens of a row.

    Returns:
      Nothing written yet.

    Raises:
      ConfigError: The model has no cache, or one that reads texts apart from answers (T5).
    """
    rows, length = shape
    leaves = jax.tree.leaves(variables, is_leaf=is_adapted)
    dtypes = [(leaf.base if is_adapted(leaf) else leaf).dtype for leaf in leaves]
    dtype = next(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    zeros = jnp.zeros((rows,), jnp.int32)
    tokens = jnp.zeros((rows, most), jnp.int32)
    make = getattr(model, "init_cache", lambda *sizes: None)
    cache = make(rows, length + most, dtype)
    if not isinstance(cache, KVCache):
        got, fix = type(model).__name__, "load a model whose class ends in ForCausalLM."
        _refuse("model", got, "a decoder, which has a cache", fix)
    return _beside(leaves, Progress(jnp.int32(0), zeros > 0, zeros, tokens, cache))


def _beside(leaves: list[Any], progress: Progress) -> Progress:
    """Tie what is fresh to the devices that the weights are tied to, if they are.

    What `advance` gives back is tied to them, so else its second call would be compiled again.
    """
    arrays = jax.tree.leaves([leaf.base if is_adapted(leaf) else leaf for leaf in leaves])
    tied = [each for each in arrays if isinstance(each, jax.Array) and not isinstance(each, Tracer)]
    where = next((each.sharding for each in tied if each.committed), None)
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    return progress if where is None else jax.device_put(progress, where)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="progress")
def advance(
    model: Any,
    variables: Any,
    ids: jax.Array,
    mask: jax.Array,
    progress: Progress,
    until: jax.Array,
    ends: jax.Array,
    padding: jax.Array,
    choice: Choice | None,
) -> Progress:
    """Write tokens until there are `until` of them, or all rows have ended.

    Args:
      model: The decoder.
      variables: `{"params": params}`, adapted or not.
      ids: (rows, prompt) int32, padded on the left.
      mask: (rows, prompt) int32.
      progress: From `begin` or an earlier call; it is given up.
      until: int32 scalar, at most the columns that there are.
      ends: (vocabulary,) booleans, the tokens that end a row.
      padding: int32 scalar, the token behind a row's end.
      choice: How tokens are drawn; None takes the likeliest.

    Returns:
      Where the batch stands then.
    """
    apply = lora_apply(model.apply)
    rows, most = progress.tokens.shape
    mask = jnp.concatenate([mask, jnp.ones((rows, most), mask.dtype)], axis=1)

    def step(tokens: jax.Array, now: Progress) -> Progress:
        """tokens: (rows, any number), those that the cache has not seen yet."""
        hidden, cache = apply(
            variables, tokens, attention_mask=mask, cache=now.cache, return_hidden=True
        )
        logits = apply(variables, hidden[:, -1], method="unembed")  # (rows, vocabulary)
        if choice is None:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (rows,)
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

    # One program for the first call and the later ones: the prompts go in only once.
    first = progress.written == 0
    progress = jax.lax.cond(first, functools.partial(step, ids), lambda now: now, progress)
    return jax.lax.while_loop(running, add, progress)


def make_choice(
    key: jax.Array | None,
    rows: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Choice | None:
    """Check the settings of a choice of tokens, and make data of them.

    Args:
      key: One key, or (rows,) keys.
      rows: How many rows draw.
      temperature: 0, or a positive number.
      top_k: None, or at least 1.
      top_p: None, or a number in (0, 1].

    Returns:
      The choice; None at temperature 0, where the likeliest token is taken.

    Raises:
      ConfigError: A number is out of its range, or there is no key.
    """
    if not 0 <= temperature < float("inf"):
        _refuse("temperature", temperature, "a number of at least 0", "0 does not sample.")
    most = np.iinfo(np.int32).max  # beyond every vocabulary: all tokens stay
    k = most if top_k is None else min(_integer("top_k", top_k), most)
    if top_p is not None and not 0 < top_p <= 1:
        _refuse("top_p", top_p, "a number above 0 and at most 1", "1 leaves all tokens in.")
    if temperature == 0:
        return None
    if key is None:
        _refuse("key", None, "a key, as temperature is above 0", "pass key=jax.random.key(0).")
    p = 1.0 if top_p is None else top_p
    return Choice(_row_keys(key, rows), jnp.float32(temperature), jnp.int32(k), jnp.float32(p))


def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        _refuse("key", f"keys {key.shape}", f"one key, or {rows} of them", "give each row one.")
    return key


def end_mask(model: Any, ids: Iterable[int]) -> np.ndarray:
    """Mark the tokens that end a row.

    Args:
      model: The decoder.
      ids: Those tokens.

    Returns:
      (vocabulary,) booleans.

    Raises:
      ConfigError: A token is not in the vocabulary.
    """
    size = model.config.vocab_size
    ends = np.zeros(size, bool)
    for index in ids:
        if not 0 <= index < size:
            _refuse("eos_id", index, f"a token, 0 to {size - 1}", "look into the tokenizer.")
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
        _refuse("attention_mask", mask.shape, f"shape {ids.shape}", "give one number a token.")
    if not mask[:, -1].all():
        rows = np.flatnonzero(mask[:, -1] == 0)[:5].tolist()
        got, fix = f"padding behind the prompts of rows {rows}", "pad prompts on the left."
        _refuse("attention_mask", got, "real tokens in the last column", fix)
    return ids.astype(np.int32), mask.astype(np.int32)


def _check_room(model: Any, mask: np.ndarray, most: int) -> None:
    """Rotation goes on for ever, for better or worse; a table of positions ends."""
    if isinstance(model.config, DecoderConfig):
        return
    length, table = int(mask.sum(axis=1).max()), model.config.max_position_embeddings
    if length + most - 1 > table:  # the last token is not gone on from
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
    raise ConfigError(format_error(f"generate: {where}", got=f"{got}", expected=expected, fix=fix))
