"""Attention of new tokens over a decoder's cache in one kernel, for NVIDIA GPUs.

Each program takes some queries of one head through a stretch of the cache with the softmax kept
online (FlashAttention, arXiv:2205.14135); the stretches are joined at the end ("Flash-Decoding",
Dao et al. 2023). No scores are kept in memory, and of a cache of any size only those turns of the
loop are taken that hold a place which a query sees.

Written for Pallas's Triton backend, which jax deprecates in favour of Mosaic, whose kernels do not
run on GPUs before Hopper. cache_attention.choose_engine tries it out first, and does without where
it fails or is gone.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

# What ran fastest on an H100: keys that a turn of the loop reads, most queries of a program (the
# least is what a tensor core takes), programs that keep the GPU busy, stretches that are joined.
_KEYS = 64
_LEAST_QUERIES, _MOST_QUERIES = 16, 64
_PROGRAMS, _MOST_STRETCHES = 264, 16
_WARPS, _STAGES = 4, 3
_LOWEST = -0.7 * float(np.finfo(np.float32).max)


def read(q_BTHh, k_BKSh, v_BKSh, start_B, positions_BT, reach, window, *, interpret=False):
  """The output [B, T, H, h] of queries over caches that hold their own keys already.

  Args:
    q_BTHh, k_BKSh, v_BKSh: of one dtype; h and S are powers of two from 16 on.
    start_B, positions_BT, reach: as in cache_attention.attend_with.
    window: sliding window, or None.
    interpret: run it as XLA operations (tests on a CPU).
  """
  from jax.experimental.pallas import triton  # here, so that all else runs without it

  batch, count, heads, head_dim = q_BTHh.shape
  kv_heads, places = k_BKSh.shape[1:3]
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
  same_for_rows = pl.BlockSpec((size,), lambda i, j, s: (j,))
  stretch = pl.BlockSpec(
    (None, None, places // stretches, head_dim),
    lambda i, j, s: (row(i), head(i) // groups, s, 0),
  )
  queries = pl.BlockSpec((None, size, None, head_dim), lambda i, j, s: (row(i), j, head(i), 0))
  out_spec = pl.BlockSpec(
    (None, None, size, None, head_dim), lambda i, j, s: (s, row(i), j, head(i), 0)
  )
  sum_spec = pl.BlockSpec((None, None, size, None), lambda i, j, s: (s, row(i), j, head(i)))
  shape = (stretches, batch, parts * size, heads)
  sums = jax.ShapeDtypeStruct(shape, jnp.float32)
  run = pl.pallas_call(
    functools.partial(_kernel, keys=keys, window=window),
    grid=(batch * heads, parts, stretches),
    in_specs=[
      pl.BlockSpec((None,), lambda i, j, s: (row(i),)), by_row, by_row, same_for_rows,
      same_for_rows, queries, stretch, stretch,
    ],
    out_specs=[out_spec, sum_spec, sum_spec],
    out_shape=[jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32), sums, sums],
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    interpret=interpret,
    name="cache_attention",
  )  # fmt: skip
  # What fills up a tile of queries stands far behind, so that no window of its reaches a place.
  out, highest, total = run(
    start_B, padded(positions_BT, 1, 2**30), padded(reach.upto, 1, -1), padded(reach.first, 0),
    padded(reach.last, 0, -1), padded(q_BTHh, 1), k_BKSh, v_BKSh,
  )  # fmt: skip
  return _join(out, highest, total)[:, :count].astype(q_BTHh.dtype)


def _join(out, highest, total):
  """Of stretches [s, B, T, H, ..] the whole: elementwise, so that XLA makes one kernel of it."""
  best = functools.reduce(jnp.maximum, highest)
  weights = [jnp.exp2(x - best)[..., None] for x in highest]
  weighted = sum(x * w for x, w in zip(out, weights, strict=True))
  return weighted / sum(x[..., None] * w for x, w in zip(total, weights, strict=True))


def _kernel(
  start_ref, position_ref, upto_ref, first_ref, last_ref, q_ref, k_ref, v_ref,
  out_ref, highest_ref, total_ref, *, keys, window,
):  # fmt: skip
  size, head_dim = q_ref.shape
  places = k_ref.shape[0]
  begin = pl.program_id(2) * places
  start, position = start_ref[...], position_ref[...]
  upto, first, last = upto_ref[...], first_ref[...], last_ref[...]
  end = start + jnp.maximum(jnp.max(upto), jnp.max(last)) + 1
  q = q_ref[...]

  def turn(i, carry):
    out, highest, total = carry
    here = pl.ds(i * keys, keys)
    place = begin + i * keys + jnp.arange(keys)
    order = (place - start)[None, :]
    seen = order <= upto[:, None]
    if window is not None:
      seen &= position[:, None] - place[None, :] < window
    seen |= (order >= first[:, None]) & (order <= last[:, None])
    scores = _product(q, k_ref[here, :], 1) * (math.log2(math.e) * head_dim**-0.5)
    scores = jnp.where(seen, scores, _LOWEST)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - new_highest[:, None])
    v = v_ref[here, :]
    shrink = jnp.exp2(highest - new_highest)
    out = out * shrink[:, None] + _product(weights.astype(v.dtype), v, 0)
    return out, new_highest, total * shrink + jnp.sum(weights, axis=1)

  turns = jnp.clip(pl.cdiv(end - begin, keys), 0, places // keys)
  first_turn = 0
  if window is not None:
    first_turn = jnp.clip((jnp.min(position) - window + 1 - begin) // keys, 0, turns)
  zeros = jnp.zeros(size, jnp.float32)
  carry = jnp.zeros((size, head_dim), jnp.float32), zeros + _LOWEST, zeros
  out_ref[...], highest_ref[...], total_ref[...] = jax.lax.fori_loop(first_turn, turns, turn, carry)


def _product(a, b, axis):
  """Over the last axis of a and this one of b, in float32."""
  return jax.lax.dot_general(
    a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
  )
