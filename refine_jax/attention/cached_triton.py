"""Attention of new tokens over a decoder's cache in one kernel, for NVIDIA GPUs.

Each program takes some queries of one head through a stretch of the cache with the softmax kept
online (FlashAttention, arXiv:2205.14135); a second kernel joins the stretches ("Flash-Decoding",
Dao et al. 2023). No scores are kept in memory, and of a cache of any size only those turns of the
loop are taken that hold a place which a query sees.

Written for Pallas's Triton backend, which jax deprecates in favour of Mosaic, whose kernels do not
run on GPUs before Hopper. cache_attention.choose_engine tries it out first, and does without where
it fails or is gone.
"""

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

if TYPE_CHECKING:
  from refine_jax.attention.cached import Reach

# What ran fastest on an H100: keys that a step of the loop reads, most queries of a program (the
# least is what a tensor core takes), programs that keep the GPU busy, stretches that are joined.
_KEYS = 64
_LEAST_QUERIES, _MOST_QUERIES = 16, 64
_PROGRAMS, _MOST_STRETCHES = 264, 16
_WARPS, _STAGES = 4, 3
_JOIN_WARPS = 1
# The score of a place that a query does not see; differences of -inf would be no numbers.
LOWEST = -0.7 * float(np.finfo(np.float32).max)


def attend(
  q_BTHh: jax.Array,
  k_BTKh: jax.Array,
  v_BTKh: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  start_B: jax.Array,
  positions_BT: jax.Array,
  reach: "Reach",
  window: int | None,
  scale: float | None = None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """The output [B, T, H, h] of queries over caches and new tokens, and the caches with these.

  The new tokens are read from where they come from, so that the caches can be written, in place,
  meanwhile.

  Args:
    q_BTHh, k_BTKh, v_BTKh, cache: of one dtype; the cache is (keys, values) [B, K, S, h], where h
      and S are powers of two from 16 on.
    start_B, positions_BT, reach: as in cache_attention.attend_with.
    window: sliding window, or None.
    scale: of queries times keys; None: head_dim ** -0.5.
    interpret: run it as XLA operations (tests on a CPU).
  """
  from jax.experimental.pallas import triton  # here, so that all else runs without it

  batch, count, heads, head_dim = q_BTHh.shape
  kv_heads, places = cache[0].shape[1:3]
  groups = heads // kv_heads
  size = min(_MOST_QUERIES, max(_LEAST_QUERIES, pl.next_power_of_2(count)))
  parts, keys = pl.cdiv(count, size), min(_KEYS, places)
  most = min(_PROGRAMS // (batch * heads * parts), places // keys, _MOST_STRETCHES)
  stretches = 2 ** max(most.bit_length() - 1, 0)

  def padded(x, axis, fill=0):
    width = [(0, 0)] * x.ndim
    width[axis] = (0, parts * size - count)
    return jnp.pad(x, width, constant_values=fill)

  # Of program (row and head, part of the queries, stretch of the cache).
  row, head = lambda i: i // heads, lambda i: i % heads
  by_row = pl.BlockSpec((None, size), lambda i, j, s: (row(i), j))
  queries = pl.BlockSpec((None, size, None, head_dim), lambda i, j, s: (row(i), j, head(i), 0))

  def new(before):  # all new tokens, of the program's key head
    index = lambda i, j, s: (row(i), 0, before + head(i) // groups, 0)  # noqa: E731
    return pl.BlockSpec((None, parts * size, None, head_dim), index)

  whole = pl.BlockSpec(
    (None, None, places, head_dim), lambda i, j, s: (row(i), head(i) // groups, 0, 0)
  )
  out_spec = pl.BlockSpec(
    (None, None, size, None, head_dim), lambda i, j, s: (s, row(i), j, head(i), 0)
  )
  sum_spec = pl.BlockSpec((None, None, size, None), lambda i, j, s: (s, row(i), j, head(i)))
  shape = (stretches, batch, parts * size, heads)
  sums = jax.ShapeDtypeStruct(shape, jnp.float32)
  run = pl.pallas_call(
    functools.partial(
      _kernel,
      triton,
      scale=head_dim**-0.5 if scale is None else scale,
      keys=keys,
      window=window,
      count=count,
      groups=groups,
    ),
    grid=(batch * heads, parts, stretches),
    in_specs=[
      pl.BlockSpec((None,), lambda i, j, s: (row(i),)),
      by_row,
      by_row,
      by_row,
      by_row,
      queries,
      new(heads),
      new(heads + kv_heads),
      whole,
      whole,
    ],
    out_specs=[out_spec, sum_spec, sum_spec, whole, whole],
    out_shape=[
      jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
      sums,
      sums,
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache),
    ],
    input_output_aliases={8: 3, 9: 4},
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    interpret=interpret,
    name="cache_attention",
  )
  # Joined, what comes before (rotations, biases) is one kernel of XLA's instead of three.
  qkv = padded(jnp.concatenate([q_BTHh, k_BTKh, v_BTKh], axis=2), 1)
  # Positions that fill up a tile of queries are so large that no window of theirs reaches a slot.
  out, highest, total, keys_after, values_after = run(
    start_B,
    padded(positions_BT, 1, 2**30),
    padded(reach.upto, 1, -1),
    padded(reach.first, 1),
    padded(reach.last, 1, -1),
    qkv,
    qkv,
    qkv,
    *cache,
  )
  joined = _join(triton, (out, highest, total), count, q_BTHh.dtype, interpret)
  return joined, (keys_after, values_after)


def _join(triton, parts, count, dtype, interpret) -> jax.Array:
  """Joins the stretches' (out [s, B, T, H, h], highest, total [s, B, T, H]): [B, count, H, h]."""
  stretches, batch, _, heads, head_dim = parts[0].shape
  if stretches == 1:
    return (parts[0] / parts[2][..., None])[0, :, :count].astype(dtype)
  # As XLA's operations it would be two kernels from eight stretches on; a layer has few in all.
  place = lambda i: (i // (count * heads), i // heads % count, i % heads)  # noqa: E731
  sums = pl.BlockSpec((stretches, None, None, None), lambda i: (0, *place(i)))
  values = pl.BlockSpec((stretches, None, None, None, head_dim), lambda i: (0, *place(i), 0))
  return pl.pallas_call(
    _join_kernel,
    grid=(batch * count * heads,),
    in_specs=[values, sums, sums],
    out_specs=pl.BlockSpec((None, None, None, head_dim), lambda i: (*place(i), 0)),
    out_shape=jax.ShapeDtypeStruct((batch, count, heads, head_dim), dtype),
    compiler_params=triton.CompilerParams(num_warps=_JOIN_WARPS),
    interpret=interpret,
    name="join_stretches",
  )(*parts)


def _join_kernel(out_ref, highest_ref, total_ref, joined_ref):
  highest = highest_ref[...]
  weights = jnp.exp2(highest - jnp.max(highest))
  weighted = jnp.sum(out_ref[...] * weights[:, None], axis=0)
  joined_ref[...] = (weighted / jnp.sum(total_ref[...] * weights)).astype(joined_ref.dtype)


def _kernel(
  triton,
  start_ref,
  position_ref,
  upto_ref,
  first_ref,
  last_ref,
  q_ref,
  new_k_ref,
  new_v_ref,
  k_ref,
  v_ref,
  out_ref,
  highest_ref,
  total_ref,
  k_out_ref,
  v_out_ref,
  *,
  scale,
  keys,
  window,
  count,
  groups,
):
  size, head_dim = q_ref.shape
  part, stretch, stretches = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  start, position = start_ref[...], position_ref[...]
  upto, first, last = upto_ref[...], first_ref[...], last_ref[...]
  q = q_ref[...]

  @pl.when((stretch == 0) & (pl.program_id(0) % groups == 0))
  def write():
    mine, there = pl.ds(part * size, size), pl.ds(start + part * size, size)
    real = (part * size + jnp.arange(size) < count)[:, None]
    for new_ref, ref in ((new_k_ref, k_out_ref), (new_v_ref, v_out_ref)):
      triton.store(ref.at[there, :], new_ref[mine, :], mask=real)

  def over(k_ref, v_ref, here, seen, carry):
    out, highest, total = carry
    scores = _product(q, k_ref[here, :], 1) * (math.log2(math.e) * scale)
    scores = jnp.where(seen, scores, LOWEST)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - new_highest[:, None])
    v = v_ref[here, :]
    shrink = jnp.exp2(highest - new_highest)
    out = out * shrink[:, None] + _product(weights.astype(v.dtype), v, 0)
    return out, new_highest, total * shrink + jnp.sum(weights, axis=1)

  def in_window(place):
    return True if window is None else position[:, None] - place[None, :] < window

  def cached(i, carry):
    place = i * keys + jnp.arange(keys)
    seen = (place < start)[None, :] & in_window(place)
    return over(k_ref, v_ref, pl.ds(i * keys, keys), seen, carry)

  def new(i, carry):
    order = i * size + jnp.arange(size)
    seen = (order[None, :] <= upto[:, None]) & in_window(start + order)
    seen |= (order[None, :] >= first[:, None]) & (order[None, :] <= last[:, None])
    return over(new_k_ref, new_v_ref, pl.ds(i * size, size), seen, carry)

  # What is filled of the cache, and in reach, is shared out evenly, however large the cache is. The
  # last stretch, which has the least, takes the new tokens too.
  new_end = jnp.maximum(jnp.max(upto), jnp.max(last)) + 1
  new_turns = jnp.where(stretch == stretches - 1, pl.cdiv(new_end, size), 0)
  turns, first_turn, first_new = pl.cdiv(start, keys), 0, 0
  if window is not None:
    lowest = jnp.min(position) - window + 1
    first_turn = jnp.clip(lowest // keys, 0, turns)
    first_new = jnp.clip((lowest - start) // size, 0, new_turns)
  each = pl.cdiv(turns - first_turn, stretches)
  begin = first_turn + stretch * each
  end = jnp.minimum(begin + each, turns)
  zeros = jnp.zeros(size, jnp.float32)
  carry = jnp.zeros((size, head_dim), jnp.float32), zeros + LOWEST, zeros
  carry = jax.lax.fori_loop(begin, end, cached, carry)
  out_ref[...], highest_ref[...], total_ref[...] = jax.lax.fori_loop(
    first_new, new_turns, new, carry
  )


def _product(a, b, axis):
  """Over the last axis of a and this one of b, in float32."""
  return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
