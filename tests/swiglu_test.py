"""Its own backward pass, against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax import swiglu


def plain(gate, up, kernel):
  return (jax.nn.silu(gate) * up) @ kernel


@pytest.fixture
def inputs():
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = ((3, 5, 24), (3, 5, 24), (24, 16), (3, 5, 16))
  return [2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def value_and_gradients(function, inputs):
  value, pull = jax.vjp(function, *inputs[:3])
  return value, *pull(inputs[3])


def test_gradients_are_those_of_autodiff(inputs):
  got = jax.jit(lambda x: value_and_gradients(swiglu.gated_product, x))(inputs)
  for a, b in zip(got, value_and_gradients(plain, inputs), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


def test_bfloat16_is_no_worse_than_autodiff(inputs):
  rounded = [x.astype(jnp.bfloat16) for x in inputs]
  want = value_and_gradients(plain, [x.astype(jnp.float32) for x in rounded])
  ours, theirs = (value_and_gradients(f, rounded) for f in (swiglu.gated_product, plain))
  for a, b, exact in zip(ours, theirs, want, strict=True):
    assert a.dtype == b.dtype == jnp.bfloat16
    error = [np.linalg.norm(np.float32(x) - exact) / np.linalg.norm(exact) for x in (a, b)]
    assert error[0] < 0.005 and error[0] < 1.1 * error[1], error


def test_only_gate_and_up_are_kept(inputs):
  _, pull = jax.vjp(swiglu.gated_product, *inputs[:3])
  kept = sorted(x.shape for x in jax.tree.leaves(pull))
  assert kept == sorted(x.shape for x in inputs[:3])
