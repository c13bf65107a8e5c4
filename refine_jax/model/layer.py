"""One layer of the decoder. What differs between families of models is a field of ModelConfig."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from refine_jax.model import rope as rope_lib
from refine_jax.model.config import ModelConfig

ACTIVATIONS: dict[str, Callable] = {
  "silu": nn.silu,
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}

# Attend: (q [B,T,H,h], k [B,T,K,h], v [B,T,K,h], cache, scale=None) -> (out [B,T,H,h], cache).
Attend = Callable[..., tuple]
# The attention of a layer with this sliding window (None: no window).
AttendWith = Callable[[int | None], Attend]

# (activations, what they are: "residual" [B, T, D], "heads" [B, T, H, h], "features" [B, T, F]) ->
# the same, with a sharding where there are several devices.
Constrain = Callable[[jax.Array, str], jax.Array]


def anywhere(x: jax.Array, kind: str) -> jax.Array:
  """The Constrain that leaves it to the compiler where activations are."""
  del kind
  return x


# Which tokens a projection's low-rank change acts on: none, all, or those where [B, T, 1] is true.
Gate = bool | jax.Array


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, computed in float32 (arXiv:1910.07467).

  Attributes:
    offset: multiplies by 1 + scale instead, with a scale that starts at zero.
  """

  eps: float
  offset: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.zeros if self.offset else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],))
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    if self.offset:
      scale = 1 + scale.astype(jnp.float32)
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


def norm(config: ModelConfig, name: str | None = None) -> RMSNorm:
  """The kind of norm that a model has everywhere."""
  return RMSNorm(config.norm_eps, config.norm_offset, name=name)


class Projection(nn.Dense):
  """A matrix product, and its low-rank change where the parameters hold factors.

  They are those of adapters.attach, or in one of the two forms of adapters.decoding_form.
  """

  def __call__(self, x: jax.Array, gate: Gate = False) -> jax.Array:
    if self.has_variable("params", "kernel_pair"):
      y, changed = jnp.split(x @ self.get_variable("params", "kernel_pair"), 2, axis=-1)
      return self._add_bias(jnp.where(gate, changed, y))
    if self.has_variable("params", "kernel_a"):
      y, change = jnp.split(x @ self.get_variable("params", "kernel_a"), [self.features], axis=-1)
      y = self._add_bias(y)
      if gate is False:
        return y
      change = change * jnp.asarray(gate, change.dtype) @ self.get_variable("params", "b")
      # cuBLAS would add to a copy of y; apart, what follows the projection adds both.
      return y + jax.lax.optimization_barrier(change)
    y = super().__call__(x)
    if gate is False or not self.has_variable("params", "a"):
      return y
    change = x @ self.get_variable("params", "a")
    if gate is not True:
      change = change * gate.astype(change.dtype)
    return y + _second_factor(change, self.get_variable("params", "b"))

  def _add_bias(self, y: jax.Array) -> jax.Array:
    if not self.use_bias:
      return y
    return y + self.get_variable("params", "bias").reshape((1,) * (y.ndim - 1) + (-1,))


def _second_factor(change: jax.Array, b: jax.Array) -> jax.Array:
  """The change [.., r] times B [r, outputs], or times as many of them as parts are joined."""
  if b.ndim == 2:
    return change @ b
  # As products of their own: a batch of them would come out with the parts first.
  parts = jnp.split(change, len(b), axis=-1)
  return jnp.concatenate([part @ matrix for part, matrix in zip(parts, b, strict=True)], axis=-1)


def _dense(config: ModelConfig, features: int, bias: bool, dtype, name: str):
  init = nn.initializers.normal(config.initializer_range)
  return Projection(features, use_bias=bias, dtype=dtype, kernel_init=init, name=name)


class Attention(nn.Module):
  """Grouped-query attention (arXiv:2305.13245) around an engine that the caller gives."""

  config: ModelConfig
  constrain: Constrain = anywhere

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    attend: Attend,
    cache: Any = None,
    gate: Gate = False,
  ) -> tuple[jax.Array, Any]:
    c, dtype = self.config, x_BTD.dtype

    def project(name, heads):
      y = _dense(c, heads * c.head_dim, c.qkv_bias, dtype, name)(x_BTD, gate)
      return y.reshape(*y.shape[:-1], heads, c.head_dim)

    if self.has_variable("params", "qkv"):  # layout.join_projections
      joined = project("qkv", c.heads + 2 * c.kv_heads)
      q, k, v = jnp.split(joined, [c.heads, c.heads + c.kv_heads], axis=-2)
    else:
      q, k = project("query", c.heads), project("key", c.kv_heads)
      v = project("value", c.kv_heads)
    q, k, v = (self.constrain(x, "heads") for x in (q, k, v))
    if c.qk_norm:
      q, k = norm(c, "query_norm")(q), norm(c, "key_norm")(k)
    q = checkpoint_name(rope_lib.rotate(q, *rotation), "query")
    k = checkpoint_name(rope_lib.rotate(k, *rotation), "key")
    v = checkpoint_name(v, "value")
    out, cache = attend(q, k, v, cache, scale=c.attention_scale)
    out = checkpoint_name(self.constrain(out, "heads"), "attention")
    out = out.reshape(*out.shape[:-2], c.heads * c.head_dim)
    return _dense(c, c.width, c.output_bias, dtype, "output")(out, gate), cache


class MLP(nn.Module):
  """A gated MLP such as SwiGLU or GeGLU (arXiv:2002.05202)."""

  config: ModelConfig
  constrain: Constrain = anywhere

  @nn.compact
  def __call__(self, x: jax.Array, gate: Gate = False) -> jax.Array:
    c, dtype = self.config, x.dtype

    def project(name, width):
      y = self.constrain(_dense(c, width, c.mlp_bias, dtype, name)(x, gate), "features")
      return checkpoint_name(y, name)

    if self.has_variable("params", "gate_up"):  # layout.join_projections
      gates, up = jnp.split(project("gate_up", 2 * c.feed_forward), 2, axis=-1)
    else:
      gates, up = project("gate", c.feed_forward), project("up", c.feed_forward)
    hidden = ACTIVATIONS[c.activation](gates) * up
    return _dense(c, c.width, c.mlp_bias, dtype, "down")(hidden, gate)


class Layer(nn.Module):
  """Attention and MLP, each after a norm and added to the residual stream."""

  config: ModelConfig
  constrain: Constrain = anywhere

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    attend: Attend,
    cache: Any = None,
    gate: Gate = False,
  ) -> tuple[jax.Array, Any]:
    c = self.config
    with jax.named_scope("attention"):
      y = norm(c, "attention_norm")(x_BTD)
      y, cache = Attention(c, self.constrain, name="attention")(y, rotation, attend, cache, gate)
      x_BTD = x_BTD + (norm(c, "attention_post_norm")(y) if c.post_norms else y)
    with jax.named_scope("mlp"):
      y = MLP(c, self.constrain, name="mlp")(norm(c, "mlp_norm")(x_BTD), gate)
      x_BTD = x_BTD + (norm(c, "mlp_post_norm")(y) if c.post_norms else y)
    return x_BTD, cache
