"""Attention of a few new tokens a row over a cache of keys and values: the decoder's engines.

  xla    two batched products and a softmax by XLA; anywhere. The cache is [B, K, S, h], so that
         each head's keys lie together and neither product needs a transpose of the cache.
  cudnn  cuDNN's fused attention on a GPU, in bfloat16 or float16. The cache is [B, S, K, h].

Dimension letters as in model.py; S is the cache's size.
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.model import ModelConfig

ENGINES = ("xla", "cudnn")
# Relative error that bfloat16 rounding alone explains.
_PROBE_TOLERANCE = 0.03


def empty_caches(config: ModelConfig, rows: int, size: int, dtype, engine: str) -> list:
  """For each layer (keys, values), zeros, in the engine's layout."""
  shape = {
    "xla": (rows, config.kv_heads, size, config.head_dim),
    "cudnn": (rows, size, config.kv_heads, config.head_dim),
  }[engine]
  return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


def size(caches: list, engine: str) -> int:
  """S, the places that the caches have."""
  return caches[0][0].shape[{"xla": 2, "cudnn": 1}[engine]]


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


def causal(rows: int, count: int) -> Reach:
  """Each token sees those before it and itself."""
  upto = jnp.broadcast_to(jnp.arange(count), (rows, count))
  return Reach(upto, jnp.zeros(count, jnp.int32), jnp.full(count, -1))


def following(start_B, count: int) -> tuple:
  """Positions [B, T] and Reach of tokens that follow one another from `start` on."""
  positions = start_B[:, None] + jnp.arange(count)[None, :]
  return positions, causal(len(start_B), count)


def attend_with(start_B, positions_BT, reach: Reach, places: int, engine: str):
  """For `model.hidden_states`: new tokens at start, start + 1, .. write the cache, then read it.

  Args:
    start_B: int32, the place in the cache of each row's first new token.
    positions_BT: int32, in the text; a sliding window counts by these.
    places: S, of the caches.
  """
  write, read = {"xla": (_write_xla, _read_xla), "cudnn": (_write_cudnn, _read_cudnn)}[engine]
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
      cache = write(cache[0], k, start_B), write(cache[1], v, start_B)
      return read(q, *cache, seen_BTS), cache

    return attend

  return with_window


def _write_xla(cache_BKSh, new_BTKh, start_B):
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


def _read_xla(q_BTHh, k_BKSh, v_BKSh, seen_BTS):
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


def _write_cudnn(cache_BSKh, new_BTKh, start_B):
  return write_rows(cache_BSKh, new_BTKh, start_B)


def _read_cudnn(q_BTHh, k_BSKh, v_BSKh, seen_BTS):
  # As a bias, because cuDNN's causal masks count positions from the first query.
  bias = jnp.where(seen_BTS, 0, -(2.0**40)).astype(q_BTHh.dtype)[:, None]
  return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, bias, implementation="cudnn")


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


@functools.cache
def choose_engine(config: ModelConfig, dtype: str) -> str:
  """cuDNN where it runs and agrees with the reference on a tiny problem of these heads."""
  if jax.default_backend() != "gpu" or dtype not in ("bfloat16", "float16"):
    return "xla"
  reason = _refusal(config, dtype)
  if reason is None:
    return "cudnn"
  logging.warning("decoding: cudnn is not used, xla is: %s", reason)
  return "xla"


def _refusal(config, dtype):
  """None if cuDNN agrees with "xla" for blocks of one token and of several, else why not."""
  for rows, count in ((1, 1), (3, 5)):
    try:
      got, want = (_probe(config, dtype, rows, count, engine) for engine in ("cudnn", "xla"))
    except Exception as error:  # whatever a kernel library raises is a reason not to use it
      return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    if not error < _PROBE_TOLERANCE:
      return f"its output differs from the reference by {error:.2g}."
  return None


def _probe(config, dtype, rows, count, engine):
  """Outputs of two passes, the second one over what the first has left in the cache."""
  places = 64
  keys = jax.random.split(jax.random.key(0), 3)
  heads = (config.heads, config.kv_heads, config.kv_heads)
  q, k, v = (
    jax.random.normal(key, (rows, 2 * count, n, config.head_dim), dtype)
    for key, n in zip(keys, heads, strict=True)
  )

  @jax.jit
  def run(q, k, v):
    cache = empty_caches(config, rows, places, dtype, engine)[0]
    outs = []
    for part in range(2):
      span = slice(part * count, (part + 1) * count)
      start = jnp.arange(rows) + part * count
      attend = attend_with(start, *following(start, count), places, engine)(None)
      out, cache = attend(q[:, span], k[:, span], v[:, span], cache)
      outs.append(out)
    return jnp.concatenate(outs, axis=1)

  return np.asarray(run(q, k, v), np.float32)
