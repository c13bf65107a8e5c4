"""Block decoding with a KV cache: the passes that an engine runs over its rows.

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

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_jax import target
from refine_jax.attention import cached
from refine_jax.attention.cached import slice_rows, write_rows
from refine_jax.batch import Array, Batch
from refine_jax.decoding import drafts, sampling
from refine_jax.decoding.settings import Settings
from refine_jax.decoding.state import State, run
from refine_jax.model import adapters, transformer
from refine_jax.model.transformer import ModelConfig

# Rows of a product with the head that take no longer than fewer (H100).
_FEW = 64


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


def decode(
  params: dict,
  state: State,
  ended: Array,
  max_passes: Array,
  least_active: Array,
  *,
  config: ModelConfig,
  settings: Settings,
) -> tuple[State, jax.Array]:
  """Passes while enough rows go on, at most `max_passes` of them.

  Args:
    ended: bool [B], rows that the host ends.
    least_active: int32, at least 1: with fewer rows on their way the loop ends.

  Returns:
    the state; and int32 [3, B], its length, passes and done, for the host to look at.
  """

  def unfinished(carry):
    count, state = carry
    return (count < max_passes) & (jnp.sum(~state.done) >= least_active)

  def body(carry):
    count, state = carry
    # Without its second result, what computes only that is removed by XLA.
    return count + 1, one_pass(params, state, config=config, settings=settings)[0]

  state = state._replace(done=state.done | ended)
  state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]
  return state, _report(state)


def traced_pass(
  params: dict, state: State, ended: Array, *, config: ModelConfig, settings: Settings
) -> tuple[State, jax.Array, Seen]:
  """One pass as `decode` runs it, and what it saw."""
  state = state._replace(done=state.done | ended)
  state, seen = one_pass(params, state, config=config, settings=settings)
  return state, _report(state), seen


def _report(state: State) -> jax.Array:
  return jnp.stack([state.length, state.passes, state.done.astype(jnp.int32)])


def one_pass(
  params: dict, state: State, *, config: ModelConfig, settings: Settings
) -> tuple[State, Seen]:
  """One forward pass over each row's window, and what the mode commits of it."""
  start = jnp.minimum(state.cached, state.length - 1)
  noise_B = state.choices.noise_token
  tokens, drafted = settings.kind.fill(state.tokens, state.drafted, state.length, settings.block)
  if tokens is not state.tokens:
    tokens = jnp.where(state.done[:, None], state.tokens, tokens)
  filled = state._replace(tokens=tokens, drafted=drafted)
  (predicted, probability), known, verified, caches = _predict(
    params, filled, start, config, settings
  )
  count, turn = _commit_count(verified, probability, state, settings)

  # The end of a row: an EOS among the committed, its limit, or that the model says nothing more.
  count = jnp.minimum(count, state.limit - state.length)
  is_eos = jnp.any(predicted[:, :, None] == state.choices.eos_ids[:, None, :], axis=-1)
  before_eos = _leading(~is_eos & (predicted != sampling.NOT_FINITE))
  ends = before_eos < count
  count = jnp.where(ends, before_eos + 1, count)
  count = jnp.where(state.done, 0, count)
  length = state.length + count
  done = state.done | ends | (length >= state.limit)

  # "fixed" refines what it predicted, wherever a block's first drafts come from.
  after = drafts.KINDS["tail"] if settings.mode == "fixed" else settings.kind
  keep, drafted = after.following(predicted, known, count, state.length, noise_B)

  def with_new(rows, new):
    """In place: rows that are done get what they have, so that all are not copied to choose."""
    if len(rows) == 1:  # XLA makes one update of it
      return jnp.where(state.done[:, None], rows, write_rows(rows, new, state.length))
    old = slice_rows(rows, state.length, new.shape[1])
    return write_rows(rows, jnp.where(state.done[:, None], old, new), state.length)

  new = state._replace(
    tokens=with_new(tokens, keep),
    probability=with_new(state.probability, probability) if settings.records else state.probability,
    length=length,
    # All that was committed before is cached now, and so are the drafts that were right.
    cached=jnp.where(state.done, state.cached, jnp.minimum(state.length + verified, length - 1)),
    drafted=jnp.where(state.done, state.drafted, drafted),
    done=done,
    turn=jnp.where(state.done, state.turn, turn),
    passes=state.passes + ~state.done,
    accepted=state.accepted + (jnp.arange(settings.most)[None, :] < count[:, None]),
    caches=caches,
  )
  return new, Seen(predicted, probability, count)


def _predict(params, state, start, config, settings):
  """What one forward pass says.

  Returns:
    Predicted [B, width], how many of these mean anything [B], verified drafts [B], caches.
  """
  block, kind = settings.block, settings.kind
  base = state.length - 1 - start
  positions, reach = cached.following(start, settings.window)
  ids = slice_rows(state.tokens, start, settings.window)
  window = Batch(ids, positions, is_noise=positions >= state.drafted[:, None])
  rows = drafts.Rows(
    base,
    state.choices.noise_token,
    state.drafted - state.length,
    slice_rows(state.probability, state.length, block - 1),
    state.choices.inverse_temperature > 0,
  )
  layout = kind.lay_out(window, reach, rows, block)
  batch = layout.batch
  if settings.random_noise:
    batch = sampling.with_random_noise(batch, config.vocab_size)
  x, caches = run(params, config, batch, start, layout.reach, state.caches, settings)

  def predicted_by(x_BnD, positions):
    logits = transformer.logits(params, x_BnD)
    both = settings.records or settings.mode == "threshold"
    chosen = sampling.choose(logits, positions + 1, state.choices, settings.sampling, both=both)
    return drafts.Predicted(*chosen)

  # Only the rows that predict the block and one run meet the head, or all at once, where these are
  # not many more, or so few that a product takes the time of reading the head.
  few = target.platform() == "gpu" and len(base) * settings.tokens <= _FEW
  every = kind.extra_predictions(block) and (few or settings.tokens <= 9 * settings.width // 8)
  everything = predicted_by(x, batch.positions) if every else None

  def choose(order_Bn):
    if everything is not None:
      return jax.tree.map(lambda y: jnp.take_along_axis(y, order_Bn, axis=1), everything)
    x_BnD = jnp.take_along_axis(x, order_Bn[:, :, None], axis=1)
    return predicted_by(x_BnD, jnp.take_along_axis(batch.positions, order_Bn, axis=1))

  own = choose(base[:, None] + jnp.arange(block)[None, :])
  drafted = slice_rows(state.tokens, state.length, block)
  right = own.tokens[:, :-1] == drafted[:, :-1]
  offset = jnp.arange(block - 1)[None, :]
  right &= offset < layout.drafts[:, None]
  if settings.random_noise or adapters.is_attached(params):
    # One that happens to be right was computed with the adapter, or from another id: no text yet.
    right &= offset < (state.drafted - state.length)[:, None]
  verified = _leading(right)
  predicted, known = kind.predict(own, verified, layout, choose)
  return predicted, known, verified, caches


def _commit_count(verified, probability, state, settings):
  """How many predictions each row commits, and its next turn."""
  turn = state.turn
  if settings.mode == "fixed":
    turn = turn + 1
    # A pass that changes no draft has reached the fixed point: further ones would repeat it.
    full = (turn >= state.choices.refine_iter) | (verified == settings.block - 1)
    return jnp.where(full, settings.block, 0), jnp.where(full, 0, turn)
  if settings.mode == "threshold":
    sure = settings.kind.may_commit(
      probability >= state.choices.tau[:, None], verified, settings.block
    )
    return jnp.maximum(verified + 1, _leading(sure)), turn
  return verified + 1, turn


def _leading(flags_BN):
  """How many flags are true before the first that is not: int32 [B]."""
  return jnp.sum(jnp.cumprod(flags_BN.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
