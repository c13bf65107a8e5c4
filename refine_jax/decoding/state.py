"""The rows of an engine on the device, and the programs that put prompts into them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from refine_jax.attention import cached
from refine_jax.attention.cached import Reach, slice_rows, write_rows
from refine_jax.batch import Array, Batch
from refine_jax.decoding import sampling
from refine_jax.decoding.settings import Settings
from refine_jax.model import transformer
from refine_jax.model.transformer import ModelConfig
from refine_jax.sharding import on_each_device, pinned


class Choices(NamedTuple):
  """The options of each row (options.Options), of which none is part of a program.

  Attributes:
    noise_token: int32 [B].
    eos_ids: int32 [B, Settings.eos_places], NO_TOKEN in those that are free.
    refine_iter, tau: int32 and float32 [B].
    inverse_temperature: float32 [B], 0 for greedy.
    top_k, top_p: int32 and float32 [B].
    seed: uint32 [B], of a row's samples.
  """

  noise_token: Array
  eos_ids: Array
  refine_iter: Array
  tau: Array
  inverse_temperature: Array
  top_k: Array
  top_p: Array
  seed: Array


# No id, and not sampling.NOT_FINITE either.
NO_TOKEN = -2


class State(NamedTuple):
  """One entry a row.

  Attributes:
    tokens: int32 [B, S].
    length: int32 [B], committed tokens, prompt included.
    cached: int32 [B], leading tokens whose cache rows are right.
    probability: float32 [B, S], of tokens after the prompt in the distribution that each was chosen
      from, where Settings.records is true.
    drafted: int32 [B], leading tokens that are text or predictions; noise tokens follow.
    limit: int32 [B], the most that length may become.
    done: bool [B]: no pass changes the row. So are rows that are free, and those whose prompt is
      not in the cache as a whole yet: of these cached is how much of it is.
    turn: int32 [B], passes over the current block ("fixed").
    passes: int32 [B].
    accepted: int32 [B, Settings.most], how often a pass committed the place at this offset.
    choices: of each row.
    caches: for each layer keys and values (cached.empty_caches).
  """

  tokens: Array
  probability: Array
  length: Array
  cached: Array
  drafted: Array
  limit: Array
  done: Array
  turn: Array
  passes: Array
  accepted: Array
  choices: Choices
  caches: list


class Pieces(NamedTuple):
  """Pieces of prompts, at most one a row, R of them with up to C tokens each.

  Attributes:
    slot: int32 [R], the row; no row of the state's where there is no piece.
    ids: int32 [R, C], of which the first `count` are read.
    start: int32 [R], the place of the first in the prompt; 0 empties the row first.
    count: int32 [R].
    last: bool [R], whether it ends the prompt: then the row decodes from now on.
    limit: int32 [R], of the row.
    choices: of the rows.
  """

  slot: Array
  ids: Array
  start: Array
  count: Array
  last: Array
  limit: Array
  choices: Choices


def empty(config: ModelConfig, settings: Settings, rows: int, size: int, dtype: DTypeLike) -> State:
  """Makes `rows` free rows with `size` places."""

  def each(value, dtype=jnp.int32):
    return jnp.full(rows, value, dtype)

  choices = Choices(
    noise_token=each(0),
    eos_ids=jnp.full((rows, settings.eos_places), NO_TOKEN, jnp.int32),
    refine_iter=each(1),
    tau=each(0, jnp.float32),
    inverse_temperature=each(0, jnp.float32),
    top_k=each(0),
    top_p=each(1, jnp.float32),
    seed=each(0, jnp.uint32),
  )
  return State(
    tokens=jnp.zeros((rows, size), jnp.int32),
    probability=jnp.zeros((rows, size), jnp.float32),
    length=each(1),
    cached=each(0),
    drafted=each(1),
    limit=each(1),
    done=each(True, bool),
    turn=each(0),
    passes=each(0),
    accepted=jnp.zeros((rows, settings.most), jnp.int32),
    choices=choices,
    caches=cached.empty_caches(config, rows, size, dtype),
  )


def empty_pieces(settings: Settings, rows: int, count: int, width: int) -> Pieces:
  """Makes `count` pieces of numpy arrays, none of which is of one of `rows` rows."""

  def each(dtype, *shape):
    return np.zeros((count, *shape), dtype)

  choices = Choices(
    noise_token=each(np.int32),
    eos_ids=each(np.int32, settings.eos_places),
    refine_iter=each(np.int32),
    tau=each(np.float32),
    inverse_temperature=each(np.float32),
    top_k=each(np.int32),
    top_p=each(np.float32),
    seed=each(np.uint32),
  )
  return Pieces(
    slot=np.arange(rows, rows + count, dtype=np.int32),
    ids=each(np.int32, width),
    start=each(np.int32),
    count=np.ones(count, np.int32),
    last=each(bool),
    limit=each(np.int32),
    choices=choices,
  )


def cache_bytes(config: ModelConfig, rows: int, size: int, dtype: DTypeLike) -> int:
  """Counts the bytes of the caches of so many rows and places."""
  width = 2 * config.layers * config.kv_heads * config.head_dim
  return rows * size * width * np.dtype(dtype).itemsize


def grow_tokens(
  tokens: jax.Array, probability: jax.Array, noise_token: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
  """The rows' tokens and probabilities [B, S] in `size` places."""
  rows, before = tokens.shape
  more = jnp.broadcast_to(noise_token[:, None], (rows, size - before))
  grown = jnp.pad(probability, ((0, 0), (0, size - before)))
  return jnp.concatenate([tokens, more], axis=1), grown


def grow_cache(cache: tuple, size: int) -> tuple:
  """A layer's keys and values [B, K, S, h] in `size` places."""
  more = size - cache[0].shape[2]
  return tuple(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in cache)


def enter(
  params: dict, state: State, pieces: Pieces, *, config: ModelConfig, settings: Settings
) -> State:
  """Puts pieces of prompts into their rows; a row whose prompt ends gets its first drafts.

  These are greedy, made from noise tokens after the prompt in the pass over its last piece, which
  has room for them.
  """
  width, ahead = pieces.ids.shape[1], settings.drafts_of_prompt
  alone = len(state.done) == 1

  def of_rows(x):  # no piece: any row's
    return x if alone else jnp.take(x, pieces.slot, axis=0, mode="clip")

  def put(x, values):
    if alone:
      return values.astype(x.dtype)
    return x.at[pieces.slot].set(values.astype(x.dtype), mode="drop")

  noise_B1 = pieces.choices.noise_token[:, None]
  positions, reach = cached.following(pieces.start, width)
  beyond = jnp.arange(width)[None, :] >= pieces.count[:, None]
  ids = jnp.where(beyond, noise_B1, pieces.ids)
  window = Batch(ids, positions, is_noise=beyond)
  if settings.random_noise:
    window = sampling.with_random_noise(window, config.vocab_size)
  caches = jax.tree.map(of_rows, state.caches)
  x, caches = run(params, config, window, pieces.start, reach, caches, settings)

  tokens = of_rows(state.tokens)
  tokens = jnp.where((pieces.start == 0)[:, None], noise_B1, tokens)
  tokens = write_rows(tokens, ids, pieces.start)
  end = pieces.start + pieces.count
  probability = of_rows(state.probability)
  if ahead:
    x_BND = slice_rows(x, pieces.count - 1, ahead)
    logits = transformer.logits(params, x_BND)
    tokens = jnp.where(
      pieces.last[:, None], write_rows(tokens, jnp.argmax(logits, axis=-1), end), tokens
    )
    if settings.records:
      sure = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
      # The first is no guess: the prompt's own last token predicts it.
      probability = write_rows(probability, sure.at[:, 0].set(1.0), end)
  # In a row that waits for its next piece passes may write where that piece will be.
  length = jnp.where(pieces.last, end, end + 1)
  zeros = jnp.zeros_like(length)
  return State(
    tokens=put(state.tokens, tokens),
    probability=put(state.probability, probability),
    length=put(state.length, length),
    cached=put(state.cached, end),
    drafted=put(state.drafted, jnp.where(pieces.last, end + ahead, length)),
    limit=put(state.limit, pieces.limit),
    done=put(state.done, ~pieces.last),
    turn=put(state.turn, zeros),
    passes=put(state.passes, zeros),
    accepted=put(state.accepted, jnp.zeros((len(zeros), settings.most), jnp.int32)),
    choices=jax.tree.map(put, state.choices, pieces.choices),
    caches=caches if alone else _with_new_places(state.caches, caches, pieces, settings.mesh),
  )


def _with_new_places(caches: list, entered: list, pieces: Pieces, mesh: Mesh | None) -> list:
  """The rows' caches with what the pieces' own, of their rows alone, have in the pieces' places."""
  width = pieces.ids.shape[1]

  def put(slot, start, cache_BKSh, entered_RKSh):
    places = start[:, None, None] + jnp.arange(width)[None, None, :]
    new = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width, axis=1))
    heads = jnp.arange(cache_BKSh.shape[1])[None, :, None]
    return cache_BKSh.at[slot[:, None, None], heads, places].set(
      new(entered_RKSh, start), mode="drop", unique_indices=True
    )

  if mesh is not None:
    whole = PartitionSpec()
    put = on_each_device(put, mesh, (whole, whole, cached.CACHE, cached.CACHE), cached.CACHE)
  return jax.tree.map(functools.partial(put, pieces.slot, pieces.start), caches, entered)


def run(
  params: dict,
  config: ModelConfig,
  window: Batch,
  start_B: jax.Array,
  reach: Reach,
  caches: list,
  settings: Settings,
) -> tuple[jax.Array, list]:
  """Hidden states of a window after the first `start` places of the caches, and these with it."""
  mesh = settings.mesh
  return transformer.hidden_states(
    params,
    config,
    window,
    cached.attend_with(start_B, window.positions, reach, settings.engine, mesh),
    dtype=caches[0][0].dtype,
    caches=caches,
    constrain=functools.partial(pinned, mesh=mesh),
  )
