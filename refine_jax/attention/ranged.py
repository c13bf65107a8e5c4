"""Attention of draft blocks over the clean text before them, and over themselves.

A block of drafts is short, and each of its tokens sees two things: a range of the clean row's keys
(its own example up to the place where the block starts), and the block itself up to the token. The
first part is attention over a range of keys for each query, computed without a mask of
[queries, keys]; the second is a small square for each block. The two are joined by their
log-sum-exps, as blocks of keys are in FlashAttention (arXiv:2205.14135).

Implementations of the first part: "xla", anywhere (the reference, with a dense mask), and "kernel"
(ranged_triton.py) on NVIDIA GPUs.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from refine_jax import target
from refine_jax.attention import packed, probe, ranged_triton
from refine_jax.attention.ranged_triton import LOWEST
from refine_jax.batch import Batch
from refine_jax.model.layer import AttendWith


def attend_blocks(
  q_BQHh: jax.Array,
  k_BQKh: jax.Array,
  v_BQKh: jax.Array,
  clean: tuple[jax.Array, jax.Array],
  first_BQ: jax.Array,
  end_BQ: jax.Array,
  *,
  block: int,
  scale: float,
  window: int | None = None,
  implementation: str = "xla",
  frozen: bool = False,
) -> jax.Array:
  """The output [B, Q, H, h] of draft tokens, blocks of `block` of them side by side.

  Args:
    q_BQHh, k_BQKh, v_BQKh: of the drafts; Q is a multiple of `block`.
    clean: keys and values [B, T, K, h] of the clean rows.
    first_BQ, end_BQ: int32, the clean keys that a draft sees: from first on, before end. None
      where end <= first.
    block: tokens of a block; one sees those of its block up to itself.
    scale: of the scores.
    window: sliding window inside the block; the range of clean keys has it already.
    implementation: "xla" or "kernel" (see `choose`).
    frozen: the clean keys and values get no gradient.
  """
  attend = {"xla": attend_xla, "kernel": ranged_triton.attend}[implementation]
  if frozen:
    clean = jax.lax.stop_gradient(clean)
  out, lse = attend(q_BQHh, *clean, first_BQ, end_BQ, scale=scale, frozen=frozen)
  own, own_lse = _attend_own_block(q_BQHh, k_BQKh, v_BQKh, block, scale, window)
  # Each draft sees itself, so the joined sum is never empty.
  joined = jnp.logaddexp(lse, own_lse)
  parts = ((out, lse), (own, own_lse))
  first, second = (x.astype(jnp.float32) * jnp.exp(s - joined)[..., None] for x, s in parts)
  return (first + second).astype(q_BQHh.dtype)


def attend_with(
  first_BQ: jax.Array,
  end_BQ: jax.Array,
  columns_BQ: jax.Array,
  *,
  block: int,
  implementation: str = "xla",
  mesh: Mesh | None = None,
  frozen: bool = True,
) -> Callable:
  """The attention of draft blocks over clean text, as two_streams.hidden_states wants it.

  Args:
    first_BQ, end_BQ: the clean columns that each draft sees where there is no sliding window.
    columns_BQ: int32, the column at whose place each draft stands; windows count by these.
    block: drafts of a block.
    implementation: "xla" or "kernel".
    mesh: splits rows over data and fsdp, heads over tensor; None: one device.
    frozen: the clean keys and values get no gradient.

  Returns:
    window -> (q, k, v, (clean keys, clean values), scale) -> (out [B, Q, H, h], None)
  """

  def with_window(window):
    first = first_BQ if window is None else jnp.maximum(first_BQ, columns_BQ - window + 1)

    def attend(q, k, v, clean, scale=None):
      def local(q, k, v, clean_k, clean_v, first, end):
        return attend_blocks(
          q,
          k,
          v,
          (clean_k, clean_v),
          first,
          end,
          block=block,
          scale=q.shape[-1] ** -0.5 if scale is None else scale,
          window=window,
          implementation=implementation,
          frozen=frozen,
        )

      split = packed.on_mesh(local, mesh, first.ndim, heads=5, rows=2)
      return split(q, k, v, clean[0], clean[1], first, end_BQ), None

    return attend

  return with_window


def _attend_own_block(q_BQHh, k_BQKh, v_BQKh, block, scale, window):
  """Causal attention inside each block: the output [B, Q, H, h] and log-sum-exps [B, Q, H]."""
  batch, count, heads, head_dim = q_BQHh.shape
  kv_heads = k_BQKh.shape[2]
  blocks = count // block
  q = q_BQHh.reshape(batch, blocks, block, kv_heads, heads // kv_heads, head_dim)
  k, v = (x.reshape(batch, blocks, block, kv_heads, head_dim) for x in (k_BQKh, v_BQKh))
  scores = jnp.einsum("banrgh,bamrh->banrgm", q, k, preferred_element_type=jnp.float32) * scale
  distance = jnp.arange(block)[:, None] - jnp.arange(block)[None, :]
  seen = (distance >= 0) & (True if window is None else distance < window)
  scores = jnp.where(seen[None, None, :, None, None, :], scores, LOWEST)
  lse = jax.nn.logsumexp(scores, axis=-1)
  weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
  out = jnp.einsum("banrgm,bamrh->banrgh", weights, v)
  return out.reshape(q_BQHh.shape), lse.reshape(batch, count, heads)


def attend_xla(
  q_BQHh: jax.Array,
  k_BTKh: jax.Array,
  v_BTKh: jax.Array,
  first_BQ: jax.Array,
  end_BQ: jax.Array,
  *,
  scale: float,
  frozen: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Each query over its own range of keys, by a dense mask.

  Returns:
    the output [B, Q, H, h] in q's dtype, zero where the range is empty; the log-sum-exps of the
    scores, float32 [B, Q, H], LOWEST where it is.
  """
  del frozen  # nothing is saved by it here
  batch, count, heads, head_dim = q_BQHh.shape
  kv_heads = k_BTKh.shape[2]
  q = q_BQHh.reshape(batch, count, kv_heads, heads // kv_heads, head_dim)
  scores = jnp.einsum("bqrgh,btrh->bqrgt", q, k_BTKh, preferred_element_type=jnp.float32) * scale
  place = jnp.arange(k_BTKh.shape[1])[None, None, :]
  seen = (place >= first_BQ[..., None]) & (place < end_BQ[..., None])
  seen = seen[:, :, None, None, :]
  highest = jax.lax.stop_gradient(jnp.max(jnp.where(seen, scores, LOWEST), axis=-1, keepdims=True))
  weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - highest, 0)), 0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  filled = total > 0
  lse = jnp.where(filled, highest + jnp.log(jnp.where(filled, total, 1)), LOWEST)[..., 0]
  weights = (weights / jnp.where(filled, total, 1)).astype(v_BTKh.dtype)
  out = jnp.einsum("bqrgt,btrh->bqrgh", weights, v_BTKh)
  return out.reshape(q_BQHh.shape), lse.reshape(batch, count, heads)


def beside(
  batch: Batch, *, draft_attention: str = "xla", mesh: Mesh | None = None, **options: Any
) -> AttendWith:
  """The engine for rows with a few blocks of drafts after them (`Batch.block_columns`).

  Args:
    batch: [B, T + blocks * N].
    draft_attention: "xla" or "kernel", for the blocks.
    mesh: splits rows over data and fsdp, heads over tensor; None: one device.
    options: of packed.attend_with, for the clean text.
  """
  rows, blocks, block = batch.block_columns.shape
  length = batch.ids.shape[1] - blocks * block
  columns = batch.block_columns.reshape(rows, -1)
  starts = jnp.repeat(batch.block_columns[..., 0], block, axis=1)
  first_positions = jnp.repeat(batch.positions[:, length::block], block, axis=1)
  clean_with = packed.attend_with(batch.segment_ids[:, :length], mesh=mesh, **options)
  drafts_with = attend_with(
    jnp.maximum(starts - first_positions, 0),
    starts,
    columns,
    block=block,
    implementation=draft_attention,
    mesh=mesh,
    frozen=False,
  )

  parts = slice(None, length), slice(length, None)

  def with_window(window):
    def attend(q, k, v, cache, scale=None):
      (clean_q, *clean), drafts = ([x[:, part] for x in (q, k, v)] for part in parts)
      out, cache = clean_with(window)(clean_q, *clean, cache, scale)
      own, _ = drafts_with(window)(*drafts, tuple(clean), scale)
      return jnp.concatenate([out, own], axis=1), cache

    return attend

  return with_window


@functools.cache
def choose(heads: int, kv_heads: int, head_dim: int, dtype: str) -> str:
  """ "kernel" where it runs and agrees with "xla" on a small problem, with a warning where not."""
  if target.platform() != "gpu":
    return "xla"
  if jnp.dtype(dtype).itemsize != 2:
    logging.warning(
      "attention: draft blocks in %s see the clean text through a dense mask, whose scores take"
      " memory for each pair of a draft and a token; the kernel without one computes in 16 bits"
      " (model.compute_dtype=bfloat16).",
      dtype,
    )
    return "xla"
  if target.named():
    return "kernel"
  reason = probe.why_not(
    lambda: _probe(ranged_triton.attend, heads, kv_heads, head_dim, dtype),
    lambda: _probe(attend_xla, heads, kv_heads, head_dim, dtype),
    ("output", "gradient of queries", "gradient of keys", "gradient of values"),
  )
  if reason is None:
    return "kernel"
  logging.warning("attention: the kernel for draft blocks is not used: %s", reason)
  return "xla"


def _probe(attend, heads, kv_heads, head_dim, dtype) -> list:
  """What an implementation gives, forward and backward, on ranges that tiles do not divide."""
  queries, places = 150, 333
  groups = heads // kv_heads
  few = min(kv_heads, 2)
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = [(2, queries, few * groups, head_dim), *[(2, places, few, head_dim)] * 2]
  arrays = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
  cotangent = jax.random.normal(keys[3], shapes[0], jnp.float32)
  index = jnp.arange(queries)
  first = jnp.stack([index // 60 * 100, index * 0 + 7])
  end = jnp.stack([first[0] + index % 60 // 5 * 8, index * 2])

  @jax.jit
  def run(q, k, v):
    def loss(q, k, v):
      out, lse = attend(q, k, v, first, end, scale=head_dim**-0.5)
      lse = jnp.where(lse > LOWEST / 2, lse, 0)
      return jnp.sum(out * cotangent) + jnp.sum(lse * cotangent[..., 0]), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return [out, *gradients]

  return run(*arrays)
