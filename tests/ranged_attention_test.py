"""Attention of draft blocks: the kernel against a dense mask, and the joined form against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.attention import ranged, ranged_triton

BATCH, PLACES, KV_HEADS, HEAD_DIM = 2, 150, 2, 16


def arrays(queries: int, groups: int, seed: int = 0, head_dim: int = HEAD_DIM) -> tuple:
  keys = jax.random.split(jax.random.key(seed), 3)
  q = jax.random.normal(keys[0], (BATCH, queries, KV_HEADS * groups, head_dim))
  shape = (BATCH, PLACES, KV_HEADS, head_dim)
  return q, jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape)


def ranges(queries: int, seed: int = 0) -> tuple:
  """Sorted, nested, empty and whole ones."""
  rng = np.random.default_rng(seed)
  first = np.sort(rng.integers(0, PLACES, (BATCH, queries)), axis=1)
  end = np.minimum(first + rng.integers(-5, 90, (BATCH, queries)), PLACES)
  first[1, :10], end[1, :10] = 0, PLACES
  first[0, -3:], end[0, -3:] = 0, 0
  return jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)


@pytest.mark.parametrize(("queries", "groups", "head_dim"), [(130, 3, 16), (64, 1, 20)])
def test_the_kernel_equals_a_dense_mask_forward_and_backward(queries, groups, head_dim):
  q, k, v = arrays(queries, groups, head_dim=head_dim)
  first, end = ranges(queries)
  cotangent = jax.random.normal(jax.random.key(7), q.shape)

  def run(attend, **options):
    def loss(q, k, v):
      out, lse = attend(q, k, v, first, end, scale=0.3, **options)
      finite = jnp.where(lse > ranged.LOWEST / 2, lse, 0)
      return jnp.sum(out * cotangent) + jnp.sum(finite * cotangent[..., 0]), (out, lse)

    gradients, outputs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return [*outputs, *gradients]

  want = run(ranged.attend_xla)
  got = run(ranged_triton.attend, interpret=True)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
  assert not np.any(want[0][0, -3:]) and np.all(want[1][0, -3:] == np.float32(ranged.LOWEST))


def test_frozen_keys_change_no_gradient_of_queries():
  q, k, v = arrays(64, 2)
  first, end = ranges(64)

  def gradient(frozen):
    def loss(q):
      out, _ = ranged_triton.attend(q, k, v, first, end, scale=0.3, frozen=frozen, interpret=True)
      return jnp.sum(jnp.sin(out))

    return jax.grad(loss)(q)

  np.testing.assert_array_equal(gradient(True), gradient(False))


def by_numpy(q, k, v, clean_k, clean_v, first, end, block, scale, window):
  """Token by token, one softmax over both parts."""
  groups = q.shape[2] // k.shape[2]
  out = np.zeros(q.shape)
  for b, i, head in np.ndindex(*q.shape[:3]):
    kv = head // groups
    begin = i // block * block
    if window is not None:
      begin = max(begin, i - window + 1)
    span = slice(first[b, i], max(first[b, i], end[b, i]))
    keys = np.concatenate([clean_k[b, span, kv], k[b, begin : i + 1, kv]])
    values = np.concatenate([clean_v[b, span, kv], v[b, begin : i + 1, kv]])
    scores = keys @ q[b, i, head] * scale
    weights = np.exp(scores - scores.max())
    out[b, i, head] = weights @ values / weights.sum()
  return out


@pytest.mark.parametrize("window", [None, 3])
def test_a_draft_sees_its_range_of_clean_text_and_its_own_block(window):
  block, queries = 5, 40
  q, clean_k, clean_v = arrays(queries, 2)
  first, end = ranges(queries)
  keys = jax.random.split(jax.random.key(5), 2)
  k, v = (jax.random.normal(x, (BATCH, queries, KV_HEADS, HEAD_DIM)) for x in keys)
  got = ranged.attend_blocks(
    q, k, v, (clean_k, clean_v), first, end, block=block, scale=0.4, window=window
  )
  want = by_numpy(*map(np.asarray, (q, k, v, clean_k, clean_v, first, end)), block, 0.4, window)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_frozen_clean_text_gets_no_gradient():
  q, clean_k, clean_v = arrays(10, 1)
  first, end = ranges(10)
  k = v = jnp.ones((BATCH, 10, KV_HEADS, HEAD_DIM))

  def loss(clean, frozen):
    out = ranged.attend_blocks(q, k, v, clean, first, end, block=5, scale=0.4, frozen=frozen)
    return jnp.sum(out**2)

  zero, some = (jax.grad(loss)((clean_k, clean_v), frozen) for frozen in (True, False))
  assert not any(np.any(x) for x in zero) and all(np.any(x) for x in some)
