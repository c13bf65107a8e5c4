"""Causal attention over packed rows: one signature, several engines.

Every engine computes, for each token, attention over the tokens of the same segment at or
before it (and inside the sliding window, where there is one). Padding, segment id 0, counts as
a segment of its own, so that every output is finite.

  xla           a masked softmax by XLA; anywhere, slow on long rows (the reference).
  cudnn         cuDNN's causal flash attention; rows that hold one segment (data.pack=False).
  cudnn_packed  cuDNN's packed form: NVIDIA Hopper or newer and jax >= 0.11.2.
  splash        the Pallas kernel for TPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from refine_jax.batch import Array, Batch
from refine_jax.model.layer import AttendWith
from refine_jax.sharding import BATCH_AXES, on_each_device

_SPLASH_LANES = 128


def attend_with(
  segment_ids_BT: jax.Array,
  *,
  backend: str = "xla",
  max_segments: int = 1,
  mesh: Mesh | None = None,
  interpret: bool = False,
) -> AttendWith:
  """The attention engine for rows of these segments, as `model.hidden_states` wants it.

  Args:
    segment_ids_BT: int32, contiguous from 1 in each row, 0 for the padding at its end.
    backend: an engine of this module (not "auto": see `choose_backend`).
    max_segments: most segments in any row, padding not counted; static.
    mesh: splits rows over data and fsdp, heads over tensor; None: one device.
    interpret: run Pallas kernels in interpret mode (tests on a CPU).

  Returns:
    window -> (q_BTHh, k_BTKh, v_BTKh, cache, scale=None) -> (out_BTHh, cache); queries times keys
    are multiplied by the scale, a number, None being head_dim ** -0.5.
  """
  engine = {
    "xla": _xla,
    "cudnn": _cudnn,
    "cudnn_packed": functools.partial(_cudnn_packed, max_segments=max_segments),
    "splash": functools.partial(_splash, interpret=interpret),
  }[backend]

  def with_window(window):
    def attend(q, k, v, cache, scale=None):
      local = functools.partial(engine, window=window, scale=scale)
      return on_mesh(local, mesh, segment_ids_BT.ndim)(q, k, v, segment_ids_BT), cache

    return attend

  return with_window


def on_mesh(
  engine: Callable, mesh: Mesh | None, rank: int, *, heads: int = 3, rows: int = 1
) -> Callable:
  """Gives each device its rows and heads, where kernels know nothing of meshes.

  Args:
    engine: (q, k, v and others [B, T, H, h], arrays of this rank that lead with B) -> [B, T, H, h].
    mesh: None: one device.
    heads, rows: how many arguments there are of the one and the other sort.
  """
  if mesh is None or mesh.size == 1:
    return engine
  by_head = PartitionSpec(BATCH_AXES, None, "tensor", None)
  by_row = PartitionSpec(BATCH_AXES, *(None,) * (rank - 1))
  in_specs = (by_head,) * heads + (by_row,) * rows
  return on_each_device(engine, mesh, in_specs, by_head)


def for_batch(batch: Batch, **options: Any) -> AttendWith:
  """The engine for a batch: `beside` where a copy stands next to each row, else `attend_with`.

  Args:
    options: keywords of these.
  """
  if batch.block_starts is not None:
    return beside(batch, **options)
  return attend_with(batch.segment_ids, **options)


def beside(
  batch: Batch, *, backend: str = "xla", max_segments: int = 1, mesh: Mesh | None = None
) -> AttendWith:
  """The engine for rows whose second half is a copy in blocks (objective/noise/block.py).

  The clean half attends as `attend_with` has it. A token of the copy sees the clean text before
  its block, and its block up to itself.

  Args:
    batch: with segment_ids and positions int32 [B, 2 T], and block_starts int32 [B, T].
    backend, max_segments, mesh: for the clean half, see attend_with. The copy's mask is data, which
      cuDNN takes as a bias; elsewhere XLA computes it.
  """
  length = batch.block_starts.shape[1]
  segments, positions = batch.segment_ids[:, :length], batch.positions[:, :length]
  clean_engine = attend_with(segments, backend=backend, max_segments=max_segments, mesh=mesh)
  starts_q, starts_k = batch.block_starts[:, :, None], batch.block_starts[:, None, :]
  distance = positions[:, :, None] - positions[:, None, :]
  same = segments[:, :, None] == segments[:, None, :]
  # A prompt's copy has no block, though it carries the start of the first one.
  in_block = positions[:, None, :] >= starts_k
  sees_clean = same & (positions[:, None, :] < starts_q)
  sees_copy = same & in_block & (starts_q == starts_k) & (distance >= 0)
  kernel = "cudnn" if backend.startswith("cudnn") else "xla"

  def with_window(window):
    near = True if window is None else distance < window
    mask = jnp.concatenate([sees_clean & near, sees_copy & near], axis=2)[:, None]

    def attend(q, k, v, cache, scale=None):
      def copy(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=kernel)

      first = (x[:, :length] for x in (q, k, v))
      clean, cache = clean_engine(window)(*first, cache, scale)
      copied = on_mesh(copy, mesh, mask.ndim)(q[:, length:], k, v, mask)
      return jnp.concatenate([clean, copied], axis=1), cache

    return attend

  return with_window


def segment_positions(segment_ids_BT: Array) -> jax.Array:
  """Positions of tokens, counted from 0 in each segment: int32 [B, T]."""
  index = jnp.arange(segment_ids_BT.shape[1])[None]
  begins = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
  return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def mask_BTT(segment_ids_BT: jax.Array, window: int | None) -> jax.Array:
  """Says which keys each query sees: bool [B, queries, keys]."""
  same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  index = jnp.arange(segment_ids_BT.shape[1])
  distance = index[:, None] - index[None, :]
  near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
  return same & near[None]


def _xla(q, k, v, segment_ids_BT, *, window, scale):
  mask = mask_BTT(segment_ids_BT, window)[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")


def _cudnn(q, k, v, segment_ids_BT, *, window, scale):
  del segment_ids_BT  # one segment a row, and what follows its end is after it
  local = None if window is None else (window - 1, 0)
  return jax.nn.dot_product_attention(
    q, k, v, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
  )


def segment_layout(segment_ids_BT: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array]:
  """Lengths and starts of each row's segments, the padding being the last one.

  Returns:
    lengths int32 [B, M] and starts int32 [B, M + 1] with M = max_segments + 1; unused places,
    the last start among them, are -1, as cuDNN's packed form wants them.
  """
  slots = max_segments + 1
  starts = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
  index_BT = jnp.cumsum(starts, axis=1) - 1
  lengths = jnp.sum(
    index_BT[:, :, None] == jnp.arange(slots)[None, None, :], axis=1, dtype=jnp.int32
  )
  begins = jnp.cumsum(lengths, axis=1) - lengths
  begins = jnp.where(lengths > 0, begins, -1)
  return jnp.where(lengths > 0, lengths, -1), jnp.pad(begins, ((0, 0), (0, 1)), constant_values=-1)


def _cudnn_packed(q, k, v, segment_ids_BT, *, window, scale, max_segments):
  # Private, for want of a public way to pass offsets (jax-ml/jax#29731 is open).
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  lengths, offsets = segment_layout(segment_ids_BT, max_segments)
  return cudnn.dot_product_attention(
    q,
    k,
    v,
    q_seqlen=lengths,
    kv_seqlen=lengths,
    q_offsets=offsets,
    kv_offsets=offsets,
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    mask_type=cudnn.MaskType.PADDING_CAUSAL,
    sliding_window_length=window,
  )


def _splash(q, k, v, segment_ids_BT, *, window, scale, interpret):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length, heads, head_dim = q.shape[1:]
  padded = -(-length // _SPLASH_LANES) * _SPLASH_LANES
  width = -(-head_dim // _SPLASH_LANES) * _SPLASH_LANES

  def prepare(x):  # to [B, heads, padded, width]
    pad = ((0, 0), (0, padded - length), (0, 0), (0, width - head_dim))
    return jnp.pad(x, pad).swapaxes(1, 2)

  shape = (padded, padded)
  mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, interpret=interpret
  )
  ids = jnp.pad(segment_ids_BT, ((0, 0), (0, padded - length)))
  scale = jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype)
  out: Any = jax.vmap(kernel)(
    prepare(q) * scale, prepare(k), prepare(v), splash.SegmentIds(q=ids, kv=ids)
  )
  return out.swapaxes(1, 2)[:, :length, :, :head_dim]
