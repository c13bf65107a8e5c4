"""Attention of a few new tokens a row over a cache of keys and values.

The cache is [B, K, S, h], so that each head's keys lie together and neither product needs a
transpose of the cache. Dimension letters as in model.py; S is the cache's size.

Engines: "xla", anywhere, and "kernel" (cache_kernel.py), faster on NVIDIA GPUs.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from refine_jax import target
from refine_jax.attention import cached_triton, probe
from refine_jax.model.config import ModelConfig
from refine_jax.sharding import on_each_device

# Of keys and values [B, K, S, h] on several devices.
CACHE = PartitionSpec(None, "tensor")


def empty_caches(config: ModelConfig, rows: int, size: int, dtype: DTypeLike) -> list:
  """Makes (keys, values) of zeros for each layer."""
  shape = (rows, config.kv_heads, size, config.head_dim)
  return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


class Reach(NamedTuple):
  """Which tokens of its own pass each token sees, by their order in the pass.

  Every token sees all that was cached before the pass.

  Attributes:
    upto: int32 [B, T], the first upto + 1 tokens.
    first, last: int32 [B, T], and those from first to last; none where last < first.
  """

  upto: jax.Array
  first: jax.Array
  last: jax.Array


def following(start_B: jax.Array, count: int) -> tuple:
  """Positions [B, T] and Reach of tokens that follow one another, each seeing those before it."""
  order = jnp.broadcast_to(jnp.arange(count), (len(start_B), count))
  nothing = jnp.zeros_like(order), jnp.full_like(order, -1)
  return start_B[:, None] + order, Reach(order, *nothing)


def attend_with(
  start_B: jax.Array,
  positions_BT: jax.Array,
  reach: Reach,
  engine: str = "xla",
  mesh: Mesh | None = None,
) -> Callable[[int | None], Callable]:
  """For `model.hidden_states`: new tokens at start, start + 1, .. go into the cache and see it.

  What is returned takes a scale like packed.attend_with's.

  Args:
    start_B: int32, the place in the cache of each row's first new token.
    positions_BT: int32, in the text; a sliding window counts by these.
    engine: "xla" or "kernel" (see `choose_engine`).
    mesh: splits heads, and those of the caches, over tensor; None: one device.
  """
  attend = {"xla": _attend, "kernel": cached_triton.attend}[engine]
  rows = (start_B, positions_BT, reach)

  def with_window(window):
    def local(scale, q, k, v, cache, start_B, positions_BT, reach):
      places = {"start_B": start_B, "positions_BT": positions_BT, "reach": reach}
      return attend(q, k, v, cache, **places, window=window, scale=scale)

    def split(q, k, v, cache, scale=None):
      if mesh is None:
        return local(scale, q, k, v, cache, *rows)
      heads = PartitionSpec(None, None, "tensor", None)
      specs = (heads,) * 3 + (CACHE,) + (PartitionSpec(),) * len(rows)
      one = functools.partial(local, scale)
      return on_each_device(one, mesh, specs, (heads, CACHE))(q, k, v, cache, *rows)

    return split

  return with_window


def kernel_is_for(config: ModelConfig, dtype: DTypeLike) -> bool:
  """Whether the kernel is meant for this model on this device; it is not tried out."""
  head_dim = config.head_dim
  power_of_two = head_dim >= 16 and head_dim & (head_dim - 1) == 0
  return target.platform() == "gpu" and jnp.dtype(dtype).itemsize == 2 and power_of_two


@functools.cache
def choose_engine(config: ModelConfig, dtype: DTypeLike) -> str:
  """ "kernel" where it runs and agrees with "xla" on tiny problems, with a warning where not."""
  if not kernel_is_for(config, dtype):
    return "xla"
  reason = probe.why_not(
    lambda: _probe(cached_triton.attend, config, dtype),
    lambda: _probe(_attend, config, dtype),
    (
      f"{what} for {count} tokens, window {window},"
      for count, window in _PROBES
      for what in ("output", "keys", "values")
    ),
  )
  if reason is None:
    return "kernel"
  logging.warning("decoding: the attention kernel is not used: %s", reason)
  return "xla"


# (tokens, sliding window). 5 tokens fill a part of the smallest tile; 81 fill a largest tile and
# a part of another.
_PROBES = ((5, None), (81, None), (81, 300))


def _probe(attend, config: ModelConfig, dtype) -> list:
  """What an engine gives for two rows of tokens, the later half of them branches of three.

  The cache has as many stretches as there can be, the last ones empty.
  """
  rows, most, places = 2, max(count for count, _ in _PROBES), 1024
  shapes = [(rows, most, heads, config.head_dim) for heads in (config.heads, config.kv_heads)]
  shapes += [shapes[1], *[(rows, config.kv_heads, places, config.head_dim)] * 2]
  start_B = jnp.array([0, 600])

  @jax.jit
  def run(q, k, v, *cache):
    arrays = []
    for count, window in _PROBES:
      positions_BT, plain = following(start_B, count)
      order = jnp.arange(count)
      branch = order >= count // 2
      reach = Reach(
        jnp.where(branch[None, :], count // 4, plain.upto),
        jnp.where(branch, order // 3 * 3, plain.first),
        jnp.where(branch, order, plain.last),
      )
      new = (x[:, :count] for x in (q, k, v))
      out, after = attend(*new, cache, start_B, positions_BT, reach, window, config.attention_scale)
      arrays += [out, *after]
    return arrays

  keys = jax.random.split(jax.random.key(0), len(shapes))
  return run(*(jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)))


def _attend(q_BTHh, k_BTKh, v_BTKh, cache, start_B, positions_BT, reach, window, scale=None):
  cache = _write(cache[0], k_BTKh, start_B), _write(cache[1], v_BTKh, start_B)
  scale = q_BTHh.shape[-1] ** -0.5 if scale is None else scale
  return _read(q_BTHh, *cache, scale, start_B, positions_BT, reach, window), cache


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


def _read(q_BTHh, k_BKSh, v_BKSh, scale, start_B, positions_BT, reach, window):
  batch, count, heads, head_dim = q_BTHh.shape
  kv_heads, places = k_BKSh.shape[1:3]
  groups = heads // kv_heads
  split = (batch, kv_heads, count, groups)
  # All queries of a key head in one product.
  q = q_BTHh.reshape(batch, count, kv_heads, groups, head_dim).swapaxes(1, 2)
  q = q.reshape(batch, kv_heads, count * groups, head_dim)
  scores = jnp.einsum("bknh,bksh->bkns", q, k_BKSh, preferred_element_type=jnp.float32)
  scores = scores.reshape(*split, places) * scale
  seen_BTS = _seen(start_B, positions_BT, reach, window, places)
  scores = jnp.where(seen_BTS[:, None, :, None, :], scores, cached_triton.LOWEST)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSh.dtype)
  weights = weights.reshape(batch, kv_heads, count * groups, places)
  out = jnp.einsum("bkns,bksh->bknh", weights, v_BKSh)
  return out.reshape(*split, head_dim).swapaxes(1, 2).reshape(q_BTHh.shape)


def _seen(start_B, positions_BT, reach, window, places):
  """Says which slots of the cache each token sees: bool [B, T, S]."""
  places_S = jnp.arange(places)[None, None, :]
  order_BTS = places_S - start_B[:, None, None]
  seen_BTS = order_BTS <= reach.upto[:, :, None]
  if window is not None:
    seen_BTS &= positions_BT[:, :, None] - places_S < window
  first, last = reach.first[:, :, None], reach.last[:, :, None]
  return seen_BTS | ((order_BTS >= first) & (order_BTS <= last))


def slice_rows(x: jax.Array, start_B: jax.Array, size: int) -> jax.Array:
  """[B, size, ...]: from each row, from its own start."""
  return jax.vmap(lambda row, s: jax.lax.dynamic_slice_in_dim(row, s, size))(x, start_B)


def write_rows(x: jax.Array, values: jax.Array, start_B: jax.Array) -> jax.Array:
  """x with values [B, n, ...] written into each row at its own start."""
  values = values.astype(x.dtype)
  if x.shape[0] == 1:  # a plain slice update, done in place; batched ones become scatters
    return jax.lax.dynamic_update_slice_in_dim(x, values, start_B[0], axis=1)
  return jax.vmap(lambda row, v, s: jax.lax.dynamic_update_slice_in_dim(row, v, s, axis=0))(
    x, values, start_B
  )
