"""Distances of drafts to the base's predictions, against dense logits, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.model.draft_head import TARGETS, draft_loss

B, Q, D, V = 3, 20, 16, 101


@pytest.fixture(scope="module")
def problem():
  keys = jax.random.split(jax.random.key(0), 5)
  x, clean = (jax.random.normal(k, (B, Q, D)) * 0.5 for k in keys[:2])
  head = jax.random.normal(keys[2], (V, D))
  targets = jax.random.randint(keys[3], (B, Q), 0, V)
  weights = jax.random.uniform(keys[4], (B, Q)) * jax.random.bernoulli(keys[4], 0.4, (B, Q))
  return x, clean, head, targets, weights


def dense(x, clean, head, targets, weights, target):
  log_q, log_p = (jax.nn.log_softmax(y @ head.T) for y in (x, clean))
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  references = targets if target == "data" else jnp.argmax(log_p, axis=-1)
  losses = {
    "data": lambda: -jnp.take_along_axis(log_q, references[..., None], axis=-1)[..., 0],
    "greedy": lambda: -jnp.take_along_axis(log_q, references[..., None], axis=-1)[..., 0],
    "kl": lambda: jnp.sum(p * (log_p - log_q), axis=-1),
    "tv": lambda: jnp.sum(jnp.abs(p - q), axis=-1) / 2,
  }[target]()
  return jnp.sum(losses * weights), (losses, references, log_q)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("chunk", [7, 1000])
def test_equals_dense_logits(problem, target, chunk):
  x, clean, head, targets, weights = problem

  def ours(x, clean, head):
    total, output = draft_loss(x, clean, head, targets, weights, target=target, chunk=chunk)
    return 3.0 * total, output  # a cotangent that is not one

  gradients = jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True)
  (total, output), (dx, dclean, dhead) = jax.jit(gradients)(x, clean, head)
  (want, (losses, references, log_q)), want_dx = jax.value_and_grad(dense, has_aux=True)(
    *problem, target
  )
  used = np.asarray(weights) > 0
  np.testing.assert_allclose(total, 3 * want, rtol=1e-5)
  np.testing.assert_allclose(dx, 3 * want_dx, atol=2e-6)
  np.testing.assert_allclose(output.losses, np.where(used, losses, 0), atol=1e-5)
  np.testing.assert_array_equal(output.references, np.where(used, references, 0))
  np.testing.assert_array_equal(output.predictions, np.where(used, log_q.argmax(-1), 0))
  np.testing.assert_allclose(
    output.confidences, np.where(used, np.exp(log_q.max(-1)), 0), rtol=1e-5
  )
  # The base is frozen.
  assert not np.any(dclean) and not np.any(dhead)


def test_total_variation_is_what_speculative_sampling_rejects(problem):
  x, clean, head, targets, weights = problem
  _, output = draft_loss(x, clean, head, targets, weights, target="tv")
  p, q = (np.asarray(jax.nn.softmax(y @ head.T)) for y in (clean, x))
  accepted = np.minimum(p, q).sum(axis=-1)
  used = np.asarray(weights) > 0
  np.testing.assert_allclose(output.losses[used], 1 - accepted[used], atol=1e-6)


def test_an_unknown_target_is_named(problem):
  with pytest.raises(ValueError, match="'cosine'"):
    draft_loss(*problem, target="cosine")
