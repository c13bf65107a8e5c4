"""The second half of SwiGLU (arXiv:2002.05202) with a backward pass of its own.

Autodiff keeps silu(gate) * up for the gradient of the matrix that follows, or computes it again
in a kernel of its own, which reads gate and up once more than needed. Here only gate and up are
kept, and one pass over them gives that product and both their gradients.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gated_product(gate, up, kernel):
  """(silu(gate) * up) @ kernel: [..., F], [..., F], [F, D] -> [..., D], all of one dtype."""
  return (jax.nn.silu(gate) * up) @ kernel


def _forward(gate, up, kernel):
  return gated_product(gate, up, kernel), (gate, up, kernel)


def _backward(saved, dy):
  gate, up, kernel = saved
  dtype = gate.dtype
  dh = dy @ kernel.T
  # All three at once behind dh; otherwise the compiler may compute the product before it, apart.
  gate, up, dh = jax.lax.optimization_barrier((gate, up, dh))
  gate, up, dh = (x.astype(jnp.float32) for x in (gate, up, dh))
  chance = jax.nn.sigmoid(gate)
  silu = gate * chance
  h = (silu * up).astype(dtype)
  dgate = (dh * up * (chance + silu * (1 - chance))).astype(dtype)
  dup = (dh * silu).astype(dtype)
  rows = tuple(range(h.ndim - 1))
  return dgate, dup, jnp.tensordot(h, dy, (rows, rows))


gated_product.defvjp(_forward, _backward)
