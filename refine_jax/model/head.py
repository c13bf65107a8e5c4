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
from refine_jax.sharding import AXES, BATCH_AXES


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
    mesh: splits tokens over all its axes ([B, T, D] only); None: one device.

  Returns:
    (sum of weight * cross-entropy, float32 scalar; HeadOutput). Gradients flow to x and
    head_VD, through the sum only.
  """
  scored = weights != 0 if scored is None else scored
  local = functools.partial(_local, chunk=chunk, gradient=gradient, frozen=frozen)
  if mesh is None or mesh.size == 1:
    total, output = local(x, head_VD, targets, weights, scored)
    return total[0], output
  # Each device takes its own tokens against the whole head; the sum of its shards' gradients
  # is one reduction at the end, not one a chunk.
  count = targets.shape[1]

  def filled_up(y):
    missing = -count % mesh.shape["tensor"]
    return jnp.pad(y, [(0, 0), (0, missing), *[(0, 0)] * (y.ndim - 2)])

  tokens = PartitionSpec(BATCH_AXES, "tensor")
  total, output = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec(BATCH_AXES, "tensor", None), PartitionSpec(), tokens, tokens, tokens),
    out_specs=(PartitionSpec(AXES), tokens),
    check_vma=False,
  )(filled_up(x), head_VD, *map(filled_up, (targets, weights, scored)))
  return jnp.sum(total), jax.tree.map(lambda y: y[:, :count], output)


def _local(x, head_VD, targets, weights, scored, *, chunk, gradient, frozen):
  shape = targets.shape
  flat = x.reshape(-1, x.shape[-1])
  chunk = min(chunk, targets.size)
  per_token = (y.reshape(-1) for y in (targets, weights, scored))
  total, output = cast(tuple, _chunked(flat, head_VD, *per_token, chunk, gradient, frozen))
  return total[None], jax.tree.map(lambda y: y.reshape(shape), output)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _chunked(x_ND, head_VD, targets_N, weights_N, scored_N, chunk, gradient, frozen) -> tuple:
  del gradient, frozen
  return _run(x_ND, head_VD, targets_N, weights_N, scored_N, chunk, with_gradients=False)[:2]


def _chunked_fwd(x_ND, head_VD, targets_N, weights_N, scored_N, chunk, gradient, frozen):
  if gradient == "forward":
    total, output, dx, dhead = _run(
      x_ND, head_VD, targets_N, weights_N, scored_N, chunk, with_gradients=True, frozen=frozen
    )
    return (total, output), (dx, None if frozen else dhead.astype(head_VD.dtype))
  result = _chunked(x_ND, head_VD, targets_N, weights_N, scored_N, chunk, gradient, frozen)
  return result, (x_ND, head_VD, targets_N, weights_N, scored_N)


def _chunked_bwd(chunk, gradient, frozen, residuals, cotangents):
  scale = cotangents[0]
  if gradient == "forward":
    dx, dhead = residuals
  else:
    x_ND, head_VD, targets_N, weights_N, scored_N = residuals
    _, _, dx, dhead = _run(
      x_ND, head_VD, targets_N, weights_N, scored_N, chunk, with_gradients=True, frozen=frozen
    )
    dhead = None if frozen else dhead.astype(head_VD.dtype)
  dhead = None if dhead is None else (dhead * scale).astype(dhead.dtype)
  return (dx * scale).astype(dx.dtype), dhead, None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _run(
  x_ND, head_VD, targets_N, weights_N, scored_N, chunk, *, with_gradients, frozen=False
) -> Any:
  """The loop over chunks of scored tokens: (total, HeadOutput[, dx_ND, dhead_VD float32])."""
  count = targets_N.size
  head = head_VD.astype(x_ND.dtype)
  order, turns = scored_first(scored_N, chunk)

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
    lse = highest + log_sum
    # A gather of one logit a token: a masked sum would read them all once more.
    losses = lse - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    total += jnp.sum(jnp.where(used, losses * weights, 0))
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
