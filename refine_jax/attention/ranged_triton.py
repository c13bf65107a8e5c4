"""Attention of each query over a range of keys, forward and backward, for NVIDIA GPUs.

FlashAttention (arXiv:2205.14135, arXiv:2307.08691), whose loop over keys takes only the tiles that
some query of the program's tile sees. No mask is read: a query has the first key that it sees
and the end of its range, two numbers.

Written for Pallas's Triton backend, which jax deprecates in favour of Mosaic. ranged.choose tries
it out first, and does without where it fails or is gone.
"""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

# Queries and keys of a tile.
_QUERIES, _KEYS = 64, 64
_LOG2_E = math.log2(math.e)
# The score of a key that a query does not see; differences of -inf would be no numbers.
LOWEST = -0.7 * float(np.finfo(np.float32).max)


def attend(
  q_BQHh: jax.Array,
  k_BTKh: jax.Array,
  v_BTKh: jax.Array,
  first_BQ: jax.Array,
  end_BQ: jax.Array,
  *,
  scale: float,
  frozen: bool = False,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes what ranged.attend_xla does, with its arguments and results.

  Args:
    frozen: keys and values get no gradient, and none is computed.
    interpret: run it as XLA operations (tests on a CPU).
  """
  count, places, head_dim = q_BQHh.shape[1], k_BTKh.shape[1], q_BQHh.shape[-1]
  # Triton's tiles are powers of two, and products want 16; zeros change neither.
  width = max(16, pl.next_power_of_2(head_dim))
  q_BQHh, k_BTKh, v_BTKh = (_padded(x, axis=-1, size=width) for x in (q_BQHh, k_BTKh, v_BTKh))
  queries = functools.partial(_padded, axis=1, size=_QUERIES)
  keys = functools.partial(_padded, axis=1, size=_KEYS)
  end_BQ = jnp.minimum(end_BQ, places)  # nothing of what fills up the last tile
  result = _attend(
    queries(q_BQHh),
    keys(k_BTKh),
    keys(v_BTKh),
    queries(first_BQ),
    queries(end_BQ),
    scale,
    frozen,
    interpret,
  )
  out, lse = cast(tuple, result)
  return out[:, :count, :, :head_dim], lse[:, :count]


def _padded(x, axis: int, size: int):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % size)
  return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, first, end, scale, frozen, interpret) -> tuple:
  return _forward(q, k, v, first, end, scale, interpret)


def _attend_fwd(q, k, v, first, end, scale, frozen, interpret):
  out, lse = _forward(q, k, v, first, end, scale, interpret)
  # Names, so that a layer's recomputation may leave the kernel out (model/remat.py).
  out, lse = checkpoint_name(out, "ranged_attention"), checkpoint_name(lse, "ranged_attention")
  return (out, lse), (q, k, v, first, end, out, lse)


def _attend_bwd(scale, frozen, interpret, residuals, cotangents):
  q, k, v, first, end, out, lse = residuals
  dout, dlse = cotangents
  # The log-sum-exp's own gradient is one more term of the same row of scores.
  delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
  rows = (q, k, v, first, end, dout, lse, delta)
  dq = _backward_queries(*rows, scale, interpret)
  if frozen:
    return dq, None, None, None, None
  dk, dv = _backward_keys(*rows, scale, interpret)
  return dq, dk, dv, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _tiles_of_keys(first_BQ, end_BQ):
  """For each tile of queries the first tile of keys that it sees, and the end: int32 [B, tiles]."""
  tiles = (first_BQ.shape[0], -1, _QUERIES)
  first, end = first_BQ.reshape(tiles), end_BQ.reshape(tiles)
  empty = end <= first
  low = jnp.min(jnp.where(empty, np.iinfo(np.int32).max, first), axis=-1)
  high = jnp.max(jnp.where(empty, 0, end), axis=-1)
  return jnp.minimum(low, high) // _KEYS, pl.cdiv(high, _KEYS)


def _tiles_of_queries(first_BQ, end_BQ, places: int):
  """For each tile of keys the first tile of queries that sees it, and the end: int32 [B, n]."""
  low, high = _tiles_of_keys(first_BQ, end_BQ)
  tile = jnp.arange(places // _KEYS)[None, None, :]
  sees = (low[:, :, None] <= tile) & (tile < high[:, :, None])
  index = jnp.arange(low.shape[1])[None, :, None]
  end = jnp.max(jnp.where(sees, index + 1, 0), axis=1)
  return jnp.minimum(jnp.min(jnp.where(sees, index, low.shape[1]), axis=1), end), end


def _call(kernel, *, grid, in_specs, out_specs, out_shape, interpret, name, stages=2):
  from jax.experimental.pallas import triton  # here, so that all else runs without it

  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=stages),
    interpret=interpret,
    name=name,
  )


def _specs(q_BQHh, k_BTKh) -> dict:
  """Blocks of a program (row and head, tile of queries), by the kind of argument."""
  heads, head_dim = q_BQHh.shape[2:]
  places, kv_heads = k_BTKh.shape[1:3]
  groups = heads // kv_heads
  row, head = (lambda i: i // heads), (lambda i: i % heads)
  return {
    "bound": pl.BlockSpec((None, None), lambda i, j: (row(i), j)),
    "row": pl.BlockSpec((None, _QUERIES), lambda i, j: (row(i), j)),
    "sum": pl.BlockSpec((None, _QUERIES, None), lambda i, j: (row(i), j, head(i))),
    "tile": pl.BlockSpec((None, _QUERIES, None, head_dim), lambda i, j: (row(i), j, head(i), 0)),
    "keys": pl.BlockSpec(
      (None, places, None, head_dim), lambda i, j: (row(i), 0, head(i) // groups, 0)
    ),
  }


def _forward(q, k, v, first, end, scale, interpret):
  batch, count, heads, _ = q.shape
  by = _specs(q, k)
  return _call(
    functools.partial(_forward_kernel, scale=scale),
    grid=(batch * heads, count // _QUERIES),
    in_specs=[by[x] for x in ("bound", "bound", "row", "row", "tile", "keys", "keys")],
    out_specs=[by["tile"], by["sum"]],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((batch, count, heads), jnp.float32),
    ],
    interpret=interpret,
    name="ranged_attention",
  )(*_tiles_of_keys(first, end), first, end, q, k, v)


def _forward_kernel(low, high, first_ref, end_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, scale):
  size, head_dim = q_ref.shape
  first, end, q = first_ref[...], end_ref[...], q_ref[...]

  def turn(i, carry):
    out, highest, total = carry
    here = pl.ds(i * _KEYS, _KEYS)
    seen = _seen(i, first, end)
    scores = jnp.where(seen, _product(q, k_ref[here, :], 1) * (scale * _LOG2_E), LOWEST)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
    weights = jnp.where(seen, jnp.exp2(scores - new_highest[:, None]), 0)
    shrink = jnp.exp2(highest - new_highest)
    v = v_ref[here, :]
    out = out * shrink[:, None] + _product(weights.astype(v.dtype), v, 0)
    return out, new_highest, total * shrink + jnp.sum(weights, axis=1)

  zeros = jnp.zeros(size, jnp.float32)
  carry = jnp.zeros((size, head_dim), jnp.float32), zeros + LOWEST, zeros
  out, highest, total = jax.lax.fori_loop(low[...], high[...], turn, carry)
  filled = total > 0
  total = jnp.where(filled, total, 1)
  out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
  lse_ref[...] = jnp.where(filled, (highest + jnp.log2(total)) / _LOG2_E, LOWEST)


def _backward_queries(q, k, v, first, end, dout, lse, delta, scale, interpret):
  batch, count, heads, _ = q.shape
  by = _specs(q, k)
  names = ("bound", "bound", "row", "row", "tile", "keys", "keys", "tile", "sum", "sum")
  return _call(
    functools.partial(_queries_kernel, scale=scale),
    grid=(batch * heads, count // _QUERIES),
    in_specs=[by[x] for x in names],
    out_specs=by["tile"],
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    interpret=interpret,
    name="ranged_attention_dq",
  )(*_tiles_of_keys(first, end), first, end, q, k, v, dout.astype(q.dtype), lse, delta)


def _queries_kernel(
  low, high, first_ref, end_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, *, scale
):
  first, end, q, dout = first_ref[...], end_ref[...], q_ref[...], dout_ref[...]
  lse, delta = lse_ref[...], delta_ref[...]

  def turn(i, dq):
    here = pl.ds(i * _KEYS, _KEYS)
    k = k_ref[here, :]
    weights = _weights(_product(q, k, 1), _seen(i, first, end), lse[:, None], scale)
    dscores = weights * (_product(dout, v_ref[here, :], 1) - delta[:, None])
    return dq + _product(dscores.astype(k.dtype), k, 0)

  dq = jax.lax.fori_loop(low[...], high[...], turn, jnp.zeros(q.shape, jnp.float32))
  dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _backward_keys(q, k, v, first, end, dout, lse, delta, scale, interpret):
  batch, count, heads, head_dim = q.shape
  places, kv_heads = k.shape[1:3]
  groups = heads // kv_heads
  row, head = (lambda i: i // kv_heads), (lambda i: i % kv_heads)
  bound = pl.BlockSpec((None, None), lambda i, j: (row(i), j))
  whole_row = pl.BlockSpec((None, count), lambda i, j: (row(i), 0))
  whole_sum = pl.BlockSpec((None, count, groups), lambda i, j: (row(i), 0, head(i)))
  whole = pl.BlockSpec((None, count, groups, head_dim), lambda i, j: (row(i), 0, head(i), 0))
  tile = pl.BlockSpec((None, _KEYS, None, head_dim), lambda i, j: (row(i), j, head(i), 0))
  return _call(
    functools.partial(_keys_kernel, scale=scale, groups=groups),
    grid=(batch * kv_heads, places // _KEYS),
    in_specs=[bound] * 2 + [whole_row] * 2 + [whole, tile, tile, whole] + [whole_sum] * 2,
    out_specs=[tile, tile],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    interpret=interpret,
    name="ranged_attention_dkv",
    stages=1,  # two tiles each of queries and of gradients would not fit
  )(*_tiles_of_queries(first, end, places), first, end, q, k, v, dout.astype(q.dtype), lse, delta)


def _keys_kernel(
  low,
  high,
  first_ref,
  end_ref,
  q_ref,
  k_ref,
  v_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dk_ref,
  dv_ref,
  *,
  scale,
  groups,
):
  k, v = k_ref[...], v_ref[...]
  tile = pl.program_id(1)

  def turn(i, carry):
    dk, dv = carry
    # One head of the group after the other, over the same tile of queries.
    here, group = pl.ds(i // groups * _QUERIES, _QUERIES), i % groups
    seen = _seen(tile, first_ref[here], end_ref[here])
    q, dout = q_ref[here, group, :], dout_ref[here, group, :]
    weights = _weights(_product(q, k, 1), seen, lse_ref[here, group][:, None], scale)
    dv += _product(weights.T.astype(dout.dtype), dout, 0)
    dscores = weights * (_product(dout, v, 1) - delta_ref[here, group][:, None])
    return dk + _product(dscores.T.astype(q.dtype), q, 0), dv

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = jax.lax.fori_loop(low[...] * groups, high[...] * groups, turn, (zeros, zeros))
  dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)


def _seen(tile, first, end):
  place = tile * _KEYS + jnp.arange(_KEYS)
  return (place[None, :] >= first[:, None]) & (place[None, :] < end[:, None])


def _weights(scores, seen, lse, scale):
  """The softmax's values again, from the log-sum-exps; an unseen score's difference may be huge."""
  exponent = jnp.where(seen, scores * (scale * _LOG2_E) - lse * _LOG2_E, LOWEST)
  return jnp.exp2(exponent)


def _product(a, b, axis):
  """Over the last axis of a and this one of b, in float32."""
  return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
