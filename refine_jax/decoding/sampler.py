"""Block decoding with a KV cache: the jitted engine under `generation.generate`.

A row is a buffer of tokens of which the first `length` are committed; drafts follow them. One
pass runs the model over a window of the buffer and predicts the tokens at length, length + 1, ..;
a mode says how many of them to commit. The window starts at the first token whose keys and values
are not in the cache (or at the last committed one), so a pass overwrites the cache rows of its
drafts, and a commit only moves a counter. The first drafts are those of the prompt's own pass, made
from noise tokens after it.

A causal model's own greedy text is the only fixed point of this: a draft that equals the
prediction made from the tokens before it, all of them committed or verified likewise, is right.
So `exact` commits the longest verified run and one token more, and gives the text of
autoregressive decoding, token for token, whatever the drafts are. Parameters may hold the factors
of a gated adapter (model/adapters.py), which act on noise tokens alone: then this text is the
base's, as no noise token is ever verified, and what a noise token leaves in the cache is
overwritten before a committed token could see it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.attention import cached
from refine_jax.attention.cached import slice_rows, write_rows
from refine_jax.batch import Array, Batch
from refine_jax.decoding import compile_cache, drafts, sampling
from refine_jax.decoding.settings import Settings
from refine_jax.model import adapters, transformer
from refine_jax.model.transformer import ModelConfig


class State(NamedTuple):
  """One entry a row.

  Attributes:
    tokens: int32 [B, S].
    length: int32 [B], committed tokens, prompt included.
    cached: int32 [B], leading tokens whose cache rows are right.
    drafted: int32 [B], leading tokens that are text or predictions; noise tokens follow.
    limit: int32 [B], the most that length may become.
    done: bool [B].
    turn: int32 [B], passes over the current block ("fixed").
    passes: int32 [B].
    accepted: int32 [Settings.most], how often a pass committed the place at this offset.
    refine_iter, tau: int32 and float32 [B], of Settings, as the next three.
    inverse_temperature: float32 [B], 1 for greedy.
    top_k, top_p: int32 and float32 [B].
    caches: for each layer keys and values (cached.empty_caches).
    seeds: uint32 [B], for sampling.
  """

  tokens: Array
  length: Array
  cached: Array
  drafted: Array
  limit: Array
  done: Array
  turn: Array
  passes: Array
  accepted: Array
  refine_iter: Array
  tau: Array
  inverse_temperature: Array
  top_k: Array
  top_p: Array
  caches: list
  seeds: Array


class Seen(NamedTuple):
  """What one pass saw: the places from State.length on, as they were predicted.

  Attributes:
    predicted: int32 [B, Settings.width].
    probability: float32 likewise, of each predicted token.
    count: int32 [B], how many were committed; 0 in rows that were done.
  """

  predicted: jax.Array
  probability: jax.Array
  count: jax.Array


def prefill(
  params: dict,
  prompts_BP: Array,
  lengths: Array,
  noise_token: Array,
  *,
  config: ModelConfig,
  size: int,
  ahead: int = 0,
  engine: str = "xla",
  random_noise: bool = False,
) -> tuple:
  """The prompts, int32 [B, P] padded on the right, in buffers of `size`: (tokens, caches).

  Args:
    ahead: this many greedy drafts after each prompt, made from noise tokens there; 0: none, noise
      tokens are left in their place.
    random_noise: as in Settings.
  """
  rows, width = prompts_BP.shape
  dtype = jax.tree.leaves(params["layers"][0])[0].dtype
  caches = cached.empty_caches(config, rows, size, dtype)
  inside = jnp.arange(width)[None, :] < lengths[:, None]
  tokens = jnp.broadcast_to(noise_token, (rows, size)).astype(jnp.int32)
  tokens = tokens.at[:, :width].set(jnp.where(inside, prompts_BP, noise_token))
  start_B = jnp.zeros(rows, jnp.int32)
  count = width + max(ahead - 1, 0)
  positions, reach = cached.following(start_B, count)
  window = Batch(tokens[:, :count], positions, is_noise=positions >= lengths[:, None])
  if random_noise:
    window = sampling.with_random_noise(window, config.vocab_size)
  x, caches = _run(params, config, window, start_B, reach, caches, engine)
  if ahead:
    drafted = jnp.argmax(transformer.logits(params, slice_rows(x, lengths - 1, ahead)), axis=-1)
    tokens = write_rows(tokens, drafted, lengths)
  return tokens, caches


def begin(
  tokens: jax.Array,
  caches: list,
  lengths: np.ndarray,
  limits: np.ndarray,
  done: np.ndarray,
  seeds: np.ndarray,
  settings: Settings,
) -> State:
  """The state after `prefill`."""

  def each(value, dtype):
    return np.full(len(lengths), value, dtype)

  # An array for each field: `decode` takes their memory over.
  return State(
    tokens=tokens,
    length=np.array(lengths),
    cached=np.array(lengths),
    drafted=lengths + np.int32(settings.drafts_of_prompt),
    limit=limits,
    done=done,
    turn=np.zeros_like(lengths),
    passes=np.zeros_like(lengths),
    accepted=np.zeros(settings.most, np.int32),
    refine_iter=each(settings.refine_iter, np.int32),
    tau=each(settings.tau, np.float32),
    # A product with it is what XLA makes of a division by a constant.
    inverse_temperature=each(1 / np.float32(settings.temperature or 1), np.float32),
    top_k=each(min(settings.top_k, np.iinfo(np.int32).max), np.int32),
    top_p=each(settings.top_p, np.float32),
    caches=caches,
    seeds=seeds,
  )


def decode(
  params: dict, state: State, max_passes: jax.Array, *, config: ModelConfig, settings: Settings
) -> State:
  """Passes until every row is done, at most `max_passes` of them."""

  def unfinished(carry):
    count, state = carry
    return (count < max_passes) & ~jnp.all(state.done)

  def body(carry):
    count, state = carry
    # Without its second result, what computes only that is removed by XLA.
    return count + 1, one_pass(params, state, config=config, settings=settings)[0]

  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def one_pass(
  params: dict, state: State, *, config: ModelConfig, settings: Settings
) -> tuple[State, Seen]:
  """One forward pass over each row's window, and what the mode commits of it."""
  start = jnp.minimum(state.cached, state.length - 1)
  tokens, drafted = settings.kind.fill(state.tokens, state.drafted, state.length, settings.block)
  filled = state._replace(tokens=tokens, drafted=drafted)
  (predicted, probability), verified, caches = _predict(params, filled, start, config, settings)
  count, turn = _commit_count(verified, probability, state, settings)

  # The end of a row: an EOS among the committed, its limit, or that the model says nothing more.
  count = jnp.minimum(count, state.limit - state.length)
  is_eos = jnp.isin(predicted, jnp.asarray(settings.eos_ids, jnp.int32))
  before_eos = _leading(~is_eos & (predicted != sampling.NOT_FINITE))
  ends = before_eos < count
  count = jnp.where(ends, before_eos + 1, count)
  count = jnp.where(state.done, 0, count)
  length = state.length + count
  done = state.done | ends | (length >= state.limit)

  # "fixed" refines what it predicted, wherever a block's first drafts come from.
  after = drafts.KINDS["tail"] if settings.mode == "fixed" else settings.kind
  keep, drafted = after.following(predicted, count, state.length, settings.noise_token)
  written = write_rows(tokens, keep, state.length)
  new = state._replace(
    tokens=jnp.where(state.done[:, None], state.tokens, written),
    length=length,
    # All that was committed before is cached now, and so are the drafts that were right.
    cached=jnp.where(state.done, state.cached, jnp.minimum(state.length + verified, length - 1)),
    drafted=jnp.where(state.done, state.drafted, drafted),
    done=done,
    turn=jnp.where(state.done, state.turn, turn),
    passes=state.passes + ~state.done,
    accepted=state.accepted
    + jnp.sum(jnp.arange(settings.most)[None, :] < count[:, None], axis=0, dtype=jnp.int32),
    caches=caches,
  )
  return new, Seen(predicted, probability, count)


def _predict(params, state, start, config, settings):
  """What one forward pass says: Predicted [B, width], verified drafts [B], caches."""
  block, kind = settings.block, settings.kind
  base = state.length - 1 - start
  positions, reach = cached.following(start, settings.window)
  ids = slice_rows(state.tokens, start, settings.window)
  window = Batch(ids, positions, is_noise=positions >= state.drafted[:, None])
  window, reach = kind.extend(window, reach, base, block, settings.noise_token)
  if settings.random_noise:
    window = sampling.with_random_noise(window, config.vocab_size)
  x, caches = _run(params, config, window, start, reach, state.caches, settings.engine)

  def choose(x_BND, first_B):
    positions = first_B[:, None] + jnp.arange(x_BND.shape[1])[None, :]
    logits = transformer.logits(params, x_BND)
    return drafts.Predicted(*sampling.choose(logits, positions, state, settings))

  # Only the rows that predict the block meet the head.
  own = choose(slice_rows(x, base, block), state.length)
  drafted = slice_rows(state.tokens, state.length, block)
  right = own.tokens[:, :-1] == drafted[:, :-1]
  if settings.random_noise or adapters.is_attached(params):
    # One that happens to be right was computed with the adapter, or from another id: no text yet.
    noise_from = state.drafted - state.length
    right &= jnp.arange(block - 1)[None, :] < noise_from[:, None]
  verified = _leading(right)
  return kind.predict(own, verified, state.length, x, choose), verified, caches


def _commit_count(verified, probability, state, settings):
  """How many predictions each row commits, and its next turn."""
  turn = state.turn
  if settings.mode == "fixed":
    turn = turn + 1
    # A pass that changes no draft has reached the fixed point: further ones would repeat it.
    full = (turn >= state.refine_iter) | (verified == settings.block - 1)
    return jnp.where(full, settings.block, 0), jnp.where(full, 0, turn)
  if settings.mode == "threshold":
    sure = settings.kind.may_commit(probability >= state.tau[:, None], verified, settings.block)
    return jnp.maximum(verified + 1, _leading(sure)), turn
  return verified + 1, turn


def _run(params, config, window: Batch, start_B, reach, caches, engine):
  """Hidden states of a window after the first `start` places of the caches, and these with it."""
  return transformer.hidden_states(
    params,
    config,
    window,
    cached.attend_with(start_B, window.positions, reach, engine),
    dtype=caches[0][0].dtype,
    caches=caches,
  )


def _leading(flags_BN):
  """How many flags are true before the first that is not: int32 [B]."""
  return jnp.sum(jnp.cumprod(flags_BN.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def programs(config: ModelConfig, settings: Settings) -> tuple:
  """The jitted (decode, one_pass) of a model's shape; parameters are an argument."""
  return _programs(config, settings.program)


@functools.lru_cache(compile_cache.MOST_PROGRAMS)
def _programs(config, settings):
  bound = {"config": config, "settings": settings}
  return tuple(
    jax.jit(functools.partial(function, **bound), donate_argnums=1)
    for function in (decode, one_pass)
  )


@functools.lru_cache(compile_cache.MOST_PROGRAMS)
def prefill_program(config: ModelConfig) -> Callable:
  """The jitted `prefill`, whose options are static."""
  return jax.jit(
    functools.partial(prefill, config=config),
    static_argnames=("size", "ahead", "engine", "random_noise"),
  )
