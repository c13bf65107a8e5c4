"""The head against dense logits, values and gradients, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax import sharding
from refine_jax.config import MeshConfig
from refine_jax.model.head import cross_entropy

B, T, D, V = 4, 24, 16, 101


def make_problem(V=V):
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (B, T, D))
  head = jax.random.normal(keys[1], (V, D))
  targets = jax.random.randint(keys[2], (B, T), 0, V)
  weights = jax.random.uniform(keys[3], (B, T)) * jax.random.bernoulli(keys[3], 0.4, (B, T))
  return x, head, targets, weights


@pytest.fixture
def problem():
  return make_problem()


def dense(x, head, targets, weights):
  log_probs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x, head))
  losses = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  return jnp.sum(losses * weights), (losses, log_probs)


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("chunk", [7, 32, 96, 1000])
# The vocabulary is split where tensor divides it, else the tokens are.
@pytest.mark.parametrize("meshed, vocabulary", [(False, V), (True, V), (True, 102)])
def test_equals_dense_logits(gradient, chunk, meshed, vocabulary):
  x, head, targets, weights = make_problem(vocabulary)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if meshed else None

  def scaled(x, head):  # a cotangent that is not one
    total, output = cross_entropy(
      x, head, targets, weights, chunk=chunk, gradient=gradient, mesh=mesh
    )
    return 3.0 * total, output

  run = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))
  (total, output), (dx, dhead) = run(x, head)
  (want, (losses, log_probs)), (want_dx, want_dhead) = jax.value_and_grad(
    dense, argnums=(0, 1), has_aux=True
  )(x, head, targets, weights)
  used = np.asarray(weights) > 0
  np.testing.assert_allclose(total, 3 * want, rtol=1e-6)
  np.testing.assert_allclose(dx, 3 * want_dx, atol=1e-5)
  np.testing.assert_allclose(dhead, 3 * want_dhead, atol=1e-5)
  np.testing.assert_allclose(output.losses, np.where(used, losses, 0), atol=1e-5)
  best = np.asarray(log_probs.argmax(-1))
  np.testing.assert_array_equal(output.predictions, np.where(used, best, 0))
  np.testing.assert_allclose(
    output.confidences, np.where(used, np.exp(log_probs.max(-1)), 0), rtol=1e-5
  )


def test_of_equal_logits_the_lowest_id_is_predicted():
  x = jnp.ones((1, 3, D))
  head = jnp.zeros((V, D)).at[jnp.array([17, 5, 90])].set(1.0)
  _, output = cross_entropy(x, head, jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3)))
  np.testing.assert_array_equal(output.predictions, [[5, 5, 5]])


def test_of_equal_logits_on_several_devices_the_lowest_id_is_predicted():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
  x, head = jnp.ones((1, 2, D)), jnp.zeros((100, D)).at[jnp.array([90, 17, 50])].set(1.0)
  run = jax.jit(lambda head: cross_entropy(x, head, *targets, mesh=mesh)[1].predictions)
  targets = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2))
  np.testing.assert_array_equal(run(head), [[17, 17]])
  np.testing.assert_array_equal(run(head.at[17].set(0)), [[50, 50]])


def test_tokens_of_weight_zero_never_reach_the_head(problem):
  x, head, targets, weights = problem
  poisoned = jnp.where(weights[..., None] > 0, x, jnp.nan)
  total, output = cross_entropy(poisoned, head, targets, weights, chunk=16)
  assert np.isfinite(total) and np.isfinite(output.losses).all()


def test_nothing_scored_gives_zero_and_not_nan(problem):
  x, head, targets, _ = problem
  zero = jnp.zeros((B, T))
  total, (dx, dhead) = jax.value_and_grad(
    lambda x, head: cross_entropy(x, head, targets, zero)[0], argnums=(0, 1)
  )(x, head)
  assert total == 0 and not dx.any() and not dhead.any()


def test_the_logits_never_exist_as_a_whole(problem):
  tokens, vocabulary = 4096, 2048
  x = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
  head = jax.ShapeDtypeStruct((vocabulary, D), jnp.float32)
  targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
  weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
  run = jax.jit(
    jax.value_and_grad(lambda *a: cross_entropy(*a, chunk=64), argnums=(0, 1), has_aux=True)
  )
  temporary = run.lower(x, head, targets, weights).compile().memory_analysis().temp_size_in_bytes
  assert temporary < tokens * vocabulary * 4 / 4


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_a_frozen_head_gets_no_gradient_and_changes_none(problem, gradient):
  x, head, targets, weights = problem

  def run(frozen):
    def loss(x, head):
      return cross_entropy(x, head, targets, weights, chunk=32, gradient=gradient, frozen=frozen)[0]

    return jax.grad(loss, argnums=(0, 1))(x, head)

  (dx, dhead), (want, some) = run(True), run(False)
  np.testing.assert_array_equal(dx, want)
  assert not np.any(dhead) and np.any(some)
