"""The output head of draft tokens on a frozen base: a distance to the base's own prediction.

A draft token and the clean token at its place predict the same next token, the one from noise, the
other from the text. Their hidden states meet the same head, chunk by chunk, so that neither logits
[N, V] nor a gradient of the head ever exist. The gradient of the drafts' hidden states is computed
next to the loss, which is linear in its one cotangent.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from refine_jax.model.head import (
  combine_reductions,
  reduce_logits,
  reduction_operands,
  scored_first,
)
from refine_jax.sharding import AXES, BATCH_AXES

# data: cross-entropy to the text's own next token. greedy: to the base's most likely one. kl:
# KL(base || draft). tv: total variation, one minus the chance that speculative sampling accepts
# (arXiv:2211.17192).
TARGETS = ("data", "greedy", "kl", "tv")


class DraftOutput(NamedTuple):
  """Per draft token, in the shape of the targets; zero where it is not scored.

  Attributes:
    predictions: int32, the most likely next token; of equals the lowest id.
    references: int32, what it should be: the text's token for "data", else the base's choice.
    losses: float32, the distance, not weighted.
    confidences: float32, the probability of the prediction.
  """

  predictions: jax.Array
  references: jax.Array
  losses: jax.Array
  confidences: jax.Array


def draft_loss(
  x: jax.Array,
  clean_x: jax.Array,
  head_VD: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  target: str = "kl",
  chunk: int = 2048,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, DraftOutput]:
  """The weighted distance of drafts to what they should predict.

  Args:
    x: hidden states of the drafts, [.., D]; products run in their dtype.
    clean_x: of the clean tokens at the same places, likewise; not read for "data".
    head_VD: the output matrix [V, D].
    targets: int32 [..], the text's next tokens; read for "data" alone.
    weights: float32 [..]; where one is 0 the token is skipped.
    target: one of TARGETS.
    chunk: tokens at a time.
    mesh: splits tokens over all its axes ([B, Q, D] only); None: one device.

  Returns:
    the sum of weight * distance, float32; a DraftOutput. Gradients flow to x, through the sum only.

  Raises:
    ValueError: no such target.
  """
  if target not in TARGETS:
    raise ValueError(f"target {target!r} is none of {', '.join(TARGETS)}")
  local = functools.partial(_local, target=target, chunk=chunk)
  if mesh is None or mesh.size == 1:
    total, output = local(x, clean_x, head_VD, targets, weights)
    return total[0], output
  # Each device takes its own tokens against the whole head, as head.cross_entropy has it.
  count = targets.shape[1]

  def filled_up(y):
    missing = -count % mesh.shape["tensor"]
    return jnp.pad(y, [(0, 0), (0, missing), *[(0, 0)] * (y.ndim - 2)])

  states, tokens = (PartitionSpec(BATCH_AXES, "tensor", *d) for d in ((None,), ()))
  total, output = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(states, states, PartitionSpec(), tokens, tokens),
    out_specs=(PartitionSpec(AXES), tokens),
    check_vma=False,
  )(filled_up(x), filled_up(clean_x), head_VD, filled_up(targets), filled_up(weights))
  return jnp.sum(total), jax.tree.map(lambda y: y[:, :count], output)


def _local(x, clean_x, head_VD, targets, weights, *, target, chunk):
  flat = (y.reshape(-1, y.shape[-1]) for y in (x, clean_x))
  chunk = even_chunk(targets.size, chunk)
  total, output = cast(
    tuple, _chunked(*flat, head_VD, targets.reshape(-1), weights.reshape(-1), target, chunk)
  )
  return total[None], jax.tree.map(lambda y: y.reshape(targets.shape), output)


def even_chunk(count: int, chunk: int) -> int:
  """A chunk of at most about `chunk` tokens by which `count` divides with little over."""
  even = -(-count // -(-count // chunk))
  return even if even < 256 else -(-even // 128) * 128  # whole tiles of a matrix product


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chunked(x_ND, clean_ND, head_VD, targets_N, weights_N, target, chunk) -> tuple:
  return _run(x_ND, clean_ND, head_VD, targets_N, weights_N, target, chunk, gradient=False)[:2]


def _chunked_fwd(x_ND, clean_ND, head_VD, targets_N, weights_N, target, chunk):
  total, output, dx = _run(
    x_ND, clean_ND, head_VD, targets_N, weights_N, target, chunk, gradient=True
  )
  return (total, output), dx


def _chunked_bwd(target, chunk, dx, cotangents):
  return (dx * cotangents[0]).astype(dx.dtype), None, None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _run(x_ND, clean_ND, head_VD, targets_N, weights_N, target, chunk, *, gradient):
  """The loop over chunks of scored tokens: (total, DraftOutput, dx_ND or None)."""
  count = targets_N.size
  head = head_VD.astype(x_ND.dtype)
  order, turns = scored_first(weights_N != 0, chunk)

  def body(i, carry):
    total, outputs, dx = carry
    rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)

    def take(y):
      return y.at[rows].get(mode="fill", fill_value=0)

    weights = take(weights_N)
    used = weights != 0

    def logits_of(y):
      # What fills up the last chunk may be anything, not numbers included.
      rows_of_y = jnp.where(used[:, None], take(y), 0)
      return jax.lax.dot_general(
        rows_of_y, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
      )

    logits = logits_of(x_ND)
    base_logits = None if target == "data" else logits_of(clean_ND)
    new, dlogits = _distance(logits, base_logits, take(targets_N), target, gradient)
    total += jnp.sum(new.losses * weights)
    outputs = DraftOutput(
      *(
        old.at[rows].set(jnp.where(used, y, 0).astype(old.dtype), mode="drop")
        for old, y in zip(outputs, new, strict=True)
      )
    )
    if gradient:
      dlogits = (dlogits * weights[:, None]).astype(x_ND.dtype)
      dx_rows = jax.lax.dot_general(
        dlogits, head, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )
      dx = dx.at[rows].set(dx_rows.astype(dx.dtype), mode="drop")
    return total, outputs, dx

  ids, numbers = jnp.zeros(count, jnp.int32), jnp.zeros(count)
  carry = jnp.zeros(()), DraftOutput(ids, ids, numbers, numbers)
  return jax.lax.fori_loop(0, turns, body, (*carry, jnp.zeros_like(x_ND) if gradient else None))


def _distance(logits, base_logits, targets, target, gradient) -> tuple:
  """One chunk's DraftOutput, and the gradient of its losses with respect to the logits [n, V]."""
  kl = target == "kl"
  draft, base = _reductions(logits, base_logits, kl)
  highest, log_sum, predictions = draft
  log_q = logits - (highest + log_sum)[:, None]
  confidences = jnp.exp(-log_sum)
  references, log_p, base_lse, mean_difference = targets, log_q, 0, 0  # what "data" does not read
  if base_logits is not None:
    base_highest, base_log_sum, references, mean_difference = base
    base_lse = base_highest + base_log_sum
    log_p = base_logits - base_lse[:, None]
  if target in ("data", "greedy"):
    losses = -jnp.take_along_axis(log_q, references[:, None], axis=1)[:, 0]
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    dlogits = jnp.exp(log_q) - (columns == references[:, None]) if gradient else None
  elif kl:
    # The mean over p of log p - log q; the logits' difference has it but for two constants.
    losses = mean_difference + (highest + log_sum) - base_lse
    dlogits = jnp.exp(log_q) - jnp.exp(log_p) if gradient else None
  else:
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    losses = 0.5 * jnp.sum(jnp.abs(p - q), axis=1)
    slope = 0.5 * jnp.sign(q - p)  # of the loss along q
    dlogits = q * (slope - jnp.sum(q * slope, axis=1, keepdims=True)) if gradient else None
  return DraftOutput(predictions, references, losses, confidences), dlogits


def _reductions(logits, base_logits, difference: bool) -> tuple:
  """reduce_logits of both, and for `difference` the base's mean of base_logits - logits.

  One read of both arrays gives all of it; a sum of its own for the mean would be one more.
  """
  if base_logits is None:
    return reduce_logits(logits), ()
  if not difference:
    return reduce_logits(logits), (*reduce_logits(base_logits), None)

  def combine(a, b):
    drafts, base = combine_reductions(a[:3], b[:3]), combine_reductions(a[3:6], b[3:6])
    mean = a[6] * jnp.exp(a[3] - base[0]) + b[6] * jnp.exp(b[3] - base[0])
    return (*drafts, *base, mean)

  (draft, draft_0), (base, base_0) = (reduction_operands(x) for x in (logits, base_logits))
  operands, initial = (*draft, *base, base_logits - logits), (*draft_0, *base_0, jnp.float32(0))
  highest, total, argmax, base_highest, base_total, base_argmax, mean = jax.lax.reduce(
    operands, initial, combine, (1,)
  )
  base_result = base_highest, jnp.log(base_total), base_argmax, mean / base_total
  return (highest, jnp.log(total), argmax), base_result
