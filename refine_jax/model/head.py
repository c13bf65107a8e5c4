"""Output head, cross-entropy and greedy prediction in one pass over chunks of tokens.

The logits [N, V] never exist as a whole, and tokens that are not scored never meet the head. With
gradient="forward" the gradients are computed next to the loss, while a chunk's logits are at hand
(three matrix products, nothing recomputed); the loss being linear in its one cotangent, the
backward pass only scales them. gradient="recompute" keeps the log-sum-exp instead and makes the
logits again (four products, no [V, D] gradient alive between the passes).
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from refine_jax.batch import Array
from refine_jax.sharding import AXES, BATCH_AXES, on_each_device


class HeadOutput(NamedTuple):
  """Per token, in the shape of the targets; zero where it is not scored.

  Attributes:
    predictions: int32, the most likely next token; of equals the lowest id.
    losses: float32, cross-entropy in nats, not weighted.
    confidences: float32, the probability of the prediction.
  """

  predictions: jax.Array
  losses: jax.Array
  confidences: jax.Array


def cross_entropy(
  x: jax.Array,
  head_VD: jax.Array,
  targets: Array,
  weights: Array,
  scored: Array | None = None,
  *,
  chunk: int = 2048,
  gradient: str = "forward",
  frozen: bool = False,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, HeadOutput]:
  """Weighted next-token cross-entropy of hidden states.

  Args:
    x: hidden states [B, T, D] or [N, D]; matrix products run in their dtype and accumulate in
      float32.
    head_VD: the output matrix [V, D], in any dtype; its gradient comes in the same.
    targets: int32, x's shape without D.
    weights: float32 likewise.
    scored: bool likewise; other tokens are skipped altogether. Default: those with a weight.
    chunk: tokens at a time.
    gradient: "forward" or "recompute".
    frozen: the head gets no gradient, and none is computed.
    mesh: splits rows over data and fsdp, and over tensor the vocabulary, where that divides it,
      else the tokens of a row ([B, T, D] only); None: one device.

  Returns:
    (sum of weight * cross-entropy, float32 scalar; HeadOutput). Gradients flow to x and
    head_VD, through the sum only.
  """
  scored = weights != 0 if scored is None else scored
  local = functools.partial(_local, chunk=chunk, gradient=gradient, frozen=frozen)
  if mesh is None or mesh.size == 1:
    total, output = local(x, head_VD, targets, weights, scored)
    return total[0], output
  if mesh.shape["tensor"] > 1 and head_VD.shape[0] % mesh.shape["tensor"] == 0:
    rows = PartitionSpec(BATCH_AXES)
    total, output = on_each_device(
      functools.partial(local, split=True),
      mesh,
      (rows, PartitionSpec("tensor"), rows, rows, rows),
      (PartitionSpec(AXES), rows),
    )(x, head_VD, targets, weights, scored)
    return jnp.sum(total), output
  # Each device takes its own tokens against the whole head; the sum of its shards' gradients
  # is one reduction at the end, not one a chunk.
  count = targets.shape[1]

  def filled_up(y):
    missing = -count % mesh.shape["tensor"]
    return jnp.pad(y, [(0, 0), (0, missing), *[(0, 0)] * (y.ndim - 2)])

  tokens = PartitionSpec(BATCH_AXES, "tensor")
  total, output = on_each_device(
    local,
    mesh,
    (PartitionSpec(BATCH_AXES, "tensor", None), PartitionSpec(), tokens, tokens, tokens),
    (PartitionSpec(AXES), tokens),
  )(filled_up(x), head_VD, *map(filled_up, (targets, weights, scored)))
  return jnp.sum(total), jax.tree.map(lambda y: y[:, :count], output)


def _local(x, head_VD, targets, weights, scored, *, chunk, gradient, frozen, split=False):
  shape = targets.shape
  flat = x.reshape(-1, x.shape[-1])
  chunk = min(chunk, targets.size)
  per_token = (y.reshape(-1) for y in (targets, weights, scored))
  static = (chunk, gradient, frozen, split)
  total, output = cast(tuple, _chunked(flat, head_VD, *per_token, *static))
  return total[None], jax.tree.map(lambda y: y.reshape(shape), output)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _chunked(
  x_ND, head_VD, targets_N, weights_N, scored_N, chunk, gradient, frozen, split
) -> tuple:
  del gradient, frozen
  arrays = (x_ND, head_VD, targets_N, weights_N, scored_N)
  return _run(*arrays, chunk, split, with_gradients=False)[:2]


def _chunked_fwd(x_ND, head_VD, targets_N, weights_N, scored_N, chunk, gradient, frozen, split):
  arrays = (x_ND, head_VD, targets_N, weights_N, scored_N)
  if gradient == "forward":
    total, output, dx, dhead = _run(*arrays, chunk, split, with_gradients=True, frozen=frozen)
    return (total, output), (dx, None if frozen else dhead.astype(head_VD.dtype))
  return _chunked(*arrays, chunk, gradient, frozen, split), arrays


def _chunked_bwd(chunk, gradient, frozen, split, residuals, cotangents):
  scale = cotangents[0]
  if gradient == "forward":
    dx, dhead = residuals
  else:
    x_ND, head_VD, targets_N, weights_N, scored_N = residuals
    arrays = (x_ND, head_VD, targets_N, weights_N, scored_N)
    _, _, dx, dhead = _run(*arrays, chunk, split, with_gradients=True, frozen=frozen)
    dhead = None if frozen else dhead.astype(head_VD.dtype)
  dhead = None if dhead is None else (dhead * scale).astype(dhead.dtype)
  return (dx * scale).astype(dx.dtype), dhead, None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _run(
  x_ND, head_VD, targets_N, weights_N, scored_N, chunk, split, *, with_gradients, frozen=False
) -> Any:
  """The loop over chunks of scored tokens: (total, HeadOutput[, dx_ND, dhead_VD float32]).

  Where the vocabulary is split over "tensor", total is the part of targets that this device has,
  dx_ND the part of its columns, and their sums over devices are what is meant.
  """
  count = targets_N.size
  head = head_VD.astype(x_ND.dtype)
  order, turns = scored_first(scored_N, chunk)
  first_id = 0
  if split:
    first_id = jax.lax.axis_index("tensor") * head_VD.shape[0]
    turns = jax.lax.pmax(turns, "tensor")  # all take part in each reduction over it

  def body(i, carry):
    total, outputs, dx, dhead = carry
    rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
    targets = targets_N.at[rows].get(mode="fill", fill_value=0)
    weights = weights_N.at[rows].get(mode="fill", fill_value=0)
    used = scored_N.at[rows].get(mode="fill", fill_value=False)
    # What fills up the last chunk is zeroed: its values may be anything, not numbers included.
    x = jnp.where(used[:, None], x_ND.at[rows].get(mode="fill", fill_value=0), 0)
    logits = jax.lax.dot_general(
      x, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    highest, log_sum, predictions = reduce_logits(logits)
    if split:
      targets -= first_id
      here = used & (targets >= 0) & (targets < head.shape[0])
      local = _one_a_row(logits, jnp.where(here, targets, 0))
      target_logits = jax.lax.psum(jnp.where(here, local, 0), "tensor")
      highest, log_sum, predictions = _over_vocabulary(highest, log_sum, predictions + first_id)
    else:
      here, target_logits = used, _one_a_row(logits, targets)
    lse = highest + log_sum
    losses = lse - target_logits
    total += jnp.sum(jnp.where(here, losses * weights, 0))
    new = (predictions, losses, jnp.exp(-log_sum))
    outputs = tuple(
      o.at[rows].set(jnp.where(used, n, 0).astype(o.dtype), mode="drop")
      for o, n in zip(outputs, new, strict=True)
    )
    if with_gradients:
      is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
      # Rounded before the two products, or XLA would run both in float32 (marin#8368).
      dlogits = (jnp.exp(logits - lse[:, None]) - is_target) * weights[:, None]
      dlogits = dlogits.astype(x.dtype)
      dx_rows = jax.lax.dot_general(
        dlogits, head, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )
      dx = dx.at[rows].set(dx_rows.astype(dx.dtype), mode="drop")
      if frozen:
        return total, outputs, dx, dhead
      dhead += jax.lax.dot_general(
        dlogits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )
    return total, outputs, dx, dhead

  outputs = (jnp.zeros(count, jnp.int32), jnp.zeros(count), jnp.zeros(count))
  dx = jnp.zeros_like(x_ND) if with_gradients else None
  dhead = jnp.zeros(head_VD.shape, jnp.float32) if with_gradients and not frozen else None
  total, outputs, dx, dhead = jax.lax.fori_loop(0, turns, body, (jnp.zeros(()), outputs, dx, dhead))
  output = HeadOutput(*outputs)
  return (total, output, dx, dhead) if with_gradients else (total, output)


def _one_a_row(logits_NV, columns_N):
  """A gather of one logit a token: a masked sum would read them all once more."""
  return jnp.take_along_axis(logits_NV, columns_N[:, None], axis=1)[:, 0]


def _over_vocabulary(highest, log_sum, predictions):
  """reduce_logits of all columns from that of each device's; of equals the lowest id."""
  top = jax.lax.pmax(highest, "tensor")
  total = jax.lax.psum(jnp.exp(log_sum + highest - top), "tensor")
  none = jnp.iinfo(jnp.int32).max
  best = jax.lax.pmin(jnp.where(highest == top, predictions, none), "tensor")
  return top, jnp.log(total), best


def scored_first(scored_N: jax.Array, chunk: int) -> tuple:
  """Says which tokens each step of a loop over chunks takes, so that no other meets the head.

  Returns:
    int32 [N, filled up to whole chunks with N], the scored ones first and in order; how many turns
    these fill, int32: data, so fori_loop becomes a while loop, which a custom rule allows.
  """
  count = scored_N.size
  order = jnp.argsort(~scored_N, stable=True)
  order = jnp.concatenate([order, jnp.full((-count % chunk,), count, order.dtype)])
  return order, (jnp.sum(scored_N) + chunk - 1) // chunk


def reduce_logits(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """max, log(sum(exp(logits - max))) and argmax of each row, in one read of the logits."""
  operands, initial = reduction_operands(logits_NV)
  highest, total, argmax = jax.lax.reduce(operands, initial, combine_reductions, (1,))
  return highest, jnp.log(total), argmax


def reduction_operands(logits_NV: jax.Array) -> tuple[tuple, tuple]:
  """What jax.lax.reduce takes with `combine_reductions`: operands and initial values."""
  columns = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1)
  lowest = jnp.finfo(jnp.float32).min  # not -inf: exp(-inf - -inf) is not a number
  initial = (jnp.float32(lowest), jnp.float32(0), jnp.int32(logits_NV.shape[1]))
  return (logits_NV, jnp.ones_like(logits_NV), columns), initial


def combine_reductions(a: tuple, b: tuple) -> tuple:
  """Joins (max, sum of exp(logits - max), argmax) of two parts of a row."""
  (max_a, sum_a, arg_a), (max_b, sum_b, arg_b) = a, b
  highest = jnp.maximum(max_a, max_b)
  total = sum_a * jnp.exp(max_a - highest) + sum_b * jnp.exp(max_b - highest)
  a_first = (max_a > max_b) | ((max_a == max_b) & (arg_a < arg_b))
  return highest, total, jnp.where(a_first, arg_a, arg_b)
