"""Which implementation of packed.py a run uses: the fastest that answers right here."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from refine_jax import target
from refine_jax.attention import probe
from refine_jax.attention.packed import for_batch, segment_positions
from refine_jax.batch import Batch
from refine_jax.errors import UserError

# Below this, cuDNN's packed form scales key offsets by the number of query heads and answers
# wrongly, in silence, where there are fewer key heads (jax-ml/jax#39521).
_PACKED_SINCE = (0, 11, 2)


def choose_backend(
  wanted: str,
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  dtype: DTypeLike,
  max_segments: int,
  packed: bool,
  blocks: bool = False,
  scale: float | None = None,
) -> str:
  """The engine for this run: what was asked for, or for "auto" the fastest that answers right.

  "auto" runs the fast engine of this platform once on a tiny packed problem with grouped heads,
  forward and backward, against the reference, and falls back to "xla" with a warning. For a device
  that is not here (target.compiling_for) nothing is run.

  Args:
    blocks: whether a copy in blocks stands next to the rows; then `packed.beside` is probed too.
    scale: the model's attention_scale.

  Raises:
    UserError: an engine was asked for by name and does not run or answers wrongly here.
  """
  platform = target.platform()
  if wanted == "cudnn" and packed:
    raise UserError(
      "config.model.attention='cudnn' attends across the examples of a packed row;"
      " use 'cudnn_packed', or config.data.pack=False."
    )
  if wanted == "auto":
    fast = {"gpu": "cudnn_packed" if packed else "cudnn", "tpu": "splash"}.get(platform, "xla")
  else:
    fast = wanted
  if fast == "xla":
    return "xla"
  reason = _refusal(fast, platform, dtype)
  if reason is None and target.named() is None:
    reason = _probe(fast, heads, kv_heads, head_dim, max_segments, blocks, scale)
  if reason is None:
    return fast
  if wanted != "auto":
    raise UserError(f"config.model.attention={wanted!r} does not work here: {reason}")
  logging.warning("attention: %s is not used, xla is: %s", fast, reason)
  return "xla"


def _refusal(backend, platform, dtype):
  needs = "tpu" if backend == "splash" else "gpu"
  if platform != needs:
    return f"it needs a {needs}, and this is a {platform}."
  if needs == "gpu" and jnp.dtype(dtype) != jnp.bfloat16:
    return f"it computes in bfloat16, and config.model.compute_dtype is {jnp.dtype(dtype).name}."
  # A plan's program has the right size whatever it would compute.
  wrong = jax.__version_info__ < _PACKED_SINCE and target.named() is None
  if backend == "cudnn_packed" and wrong:
    return f"jax {jax.__version__} computes it wrongly for grouped heads; 0.11.2 is right."
  return None


def _probe(backend, heads, kv_heads, head_dim, max_segments, blocks, scale=None):
  """None if `backend` agrees with the reference on a tiny packed problem, else why not."""
  length = 256
  cuts = [length] if backend == "cudnn" else [100, 37, 1, 90]  # the rest is padding
  cuts = cuts[:max_segments]
  row = np.zeros((2, length), np.int32)
  row[0, : sum(cuts)] = np.repeat(np.arange(1, len(cuts) + 1), cuts)
  row[1, : cuts[0]] = 1
  if backend == "cudnn":
    row[:] = 1
  segments, positions = jnp.asarray(row), segment_positions(jnp.asarray(row))
  batch = Batch(ids=jnp.zeros_like(segments), positions=positions, segment_ids=segments)
  if blocks:
    batch = batch.map(lambda x: jnp.tile(x, 2))._replace(block_starts=positions // 7 * 7)
  groups = heads // kv_heads
  small_heads = 2 * groups if kv_heads > 1 else groups
  keys = jax.random.split(jax.random.key(0), 4)
  count = {0: small_heads, 1: small_heads // groups, 2: small_heads // groups, 3: small_heads}
  q, k, v, weight = (
    jax.random.normal(key, (*batch.ids.shape, count[i], head_dim), jnp.bfloat16)
    for i, key in enumerate(keys)
  )

  def run(backend, q, k, v):
    engine = for_batch(batch, backend=backend, max_segments=max_segments)
    out = engine(None)(q, k, v, None, scale)[0]
    return jnp.sum((out * weight).astype(jnp.float32)), out

  def outputs(backend):
    grad = jax.jit(jax.grad(functools.partial(run, backend), argnums=(0, 1, 2), has_aux=True))
    grads, out = grad(q, k, v)
    return (*grads, out)

  names = (f"{name} on a packed problem" for name in ("dq", "dk", "dv", "out"))
  return probe.why_not(lambda: outputs(backend), lambda: outputs("xla"), names)
