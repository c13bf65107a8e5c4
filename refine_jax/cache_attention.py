"""Attention of a few new tokens a row over a cache of keys and values.

The cache is [B, K, S, h], so that each head's keys lie together and neither product needs a
transpose of the cache. Dimension letters as in model.py; S is the cache's size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_jax.model import ModelConfig


def empty_caches(config: ModelConfig, rows: int, size: int, dtype) -> list:
  """For each layer (keys, values), zeros."""
  shape = (rows, config.kv_heads, size, config.head_dim)
  return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


def size(caches: list) -> int:
  """S, the places that the caches have."""
  return caches[0][0].shape[2]


class Reach(NamedTuple):
  """Which of the tokens of one pass a token sees, by their order in it; all that was cached before
  the pass is seen anyhow.

  Attributes:
    upto: int32 [B, T], the first upto + 1 tokens.
    first, last: int32 [T], and those from first to last; none where last < first.
  """

  upto: jax.Array
  first: jax.Array
  last: jax.Array


def following(start_B, count: int) -> tuple:
  """Positions [B, T] and Reach of tokens that follow one another, each seeing those before it."""
  order = jnp.broadcast_to(jnp.arange(count), (len(start_B), count))
  nothing = jnp.zeros(count, jnp.int32), jnp.full(count, -1)
  return start_B[:, None] + order, Reach(order, *nothing)


def attend_with(start_B, positions_BT, reach: Reach, places: int):
  """For `model.hidden_states`: new tokens at start, start + 1, .. write the cache, then read it.

  Args:
    start_B: int32, the place in the cache of each row's first new token.
    positions_BT: int32, in the text; a sliding window counts by these.
    places: S, of the caches.
  """
  places_S = jnp.arange(places)[None, None, :]
  order_BTS = places_S - start_B[:, None, None]
  before_BTS = order_BTS <= reach.upto[:, :, None]
  first, last = reach.first[None, :, None], reach.last[None, :, None]
  beside_BTS = (order_BTS >= first) & (order_BTS <= last)
  distance_BTS = positions_BT[:, :, None] - places_S

  def with_window(window):
    near = True if window is None else distance_BTS < window
    seen_BTS = (before_BTS & near) | beside_BTS

    def attend(q, k, v, cache):
      cache = _write(cache[0], k, start_B), _write(cache[1], v, start_B)
      return _read(q, *cache, seen_BTS), cache

    return attend

  return with_window


def _write(cache_BKSh, new_BTKh, start_B):
  new_BKTh = new_BTKh.swapaxes(1, 2).astype(cache_BKSh.dtype)
  if len(start_B) == 1:
    return jax.lax.dynamic_update_slice_in_dim(cache_BKSh, new_BKTh, start_B[0], axis=2)
  # A scatter, in place only where its dimensions lead: so rows and heads become one.
  rows, heads = new_BKTh.shape[:2]
  flat = write_rows(
    cache_BKSh.reshape(rows * heads, *cache_BKSh.shape[2:]),
    new_BKTh.reshape(rows * heads, *new_BKTh.shape[2:]),
    jnp.repeat(start_B, heads, total_repeat_length=rows * heads),
  )
  return flat.reshape(cache_BKSh.shape)


def _read(q_BTHh, k_BKSh, v_BKSh, seen_BTS):
  batch, count, heads, head_dim = q_BTHh.shape
  kv_heads, places = k_BKSh.shape[1:3]
  groups = heads // kv_heads
  split = (batch, kv_heads, count, groups)
  # All queries of a key head in one product.
  q = q_BTHh.reshape(batch, count, kv_heads, groups, head_dim).swapaxes(1, 2)
  q = q.reshape(batch, kv_heads, count * groups, head_dim)
  scores = jnp.einsum("bknh,bksh->bkns", q, k_BKSh, preferred_element_type=jnp.float32)
  scores = scores.reshape(*split, places) * head_dim**-0.5
  lowest = -0.7 * jnp.finfo(jnp.float32).max
  scores = jnp.where(seen_BTS[:, None, :, None, :], scores, lowest)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSh.dtype)
  weights = weights.reshape(batch, kv_heads, count * groups, places)
  out = jnp.einsum("bkns,bksh->bknh", weights, v_BKSh)
  return out.reshape(*split, head_dim).swapaxes(1, 2).reshape(q_BTHh.shape)


def slice_rows(x, start_B, size):
  """[B, size, ...]: from each row, from its own start."""
  return jax.vmap(lambda row, s: jax.lax.dynamic_slice_in_dim(row, s, size))(x, start_B)


def write_rows(x, values, start_B):
  """x with values [B, n, ...] written into each row at its own start."""
  values = values.astype(x.dtype)
  if x.shape[0] == 1:  # a plain slice update, done in place; batched ones become scatters
    return jax.lax.dynamic_update_slice_in_dim(x, values, start_B[0], axis=1)
  return jax.vmap(lambda row, v, s: jax.lax.dynamic_update_slice_in_dim(row, v, s, axis=0))(
    x, values, start_B
  )
