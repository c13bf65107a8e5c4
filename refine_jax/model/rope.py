"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their length extensions.

The pairing is Hugging Face's: dimension i turns with dimension i + head_dim / 2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.batch import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Base and scaling. The fields after `kind` are read only by the kinds that name them.

  Attributes:
    theta: base of the frequencies.
    kind: "default"; "linear" (Chen et al. 2023, arXiv:2306.15595); "llama3" (Llama 3.1's
      piecewise interpolation); "yarn" (Peng et al. 2023, arXiv:2309.00071).
    factor: linear, llama3, yarn: by how much the context grows.
    original_length: llama3, yarn: positions seen in pretraining.
    low_freq_factor, high_freq_factor: llama3.
    beta_fast, beta_slow, truncate: yarn: the ramp's ends, in turns over original_length, and
      whether they are rounded to whole dimensions.
    attention_factor: yarn: multiplies cos and sin, so attention logits get its square.
  """

  theta: float = 10000.0
  kind: str = "default"
  factor: float = 1.0
  original_length: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float = 1.0


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Radians per position of each dimension pair: float32 [head_dim / 2]."""
  inverse = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if rope.kind == "default":
    scaled = inverse
  elif rope.kind == "linear":
    scaled = inverse / rope.factor
  elif rope.kind == "llama3":
    scaled = _llama3(rope, inverse)
  elif rope.kind == "yarn":
    scaled = _yarn(rope, inverse, head_dim)
  else:
    raise ValueError(f"unknown rope kind {rope.kind!r}")
  return scaled.astype(np.float32)


def _llama3(rope, inverse):
  # Turns that a pair makes over the pretraining length decide: many turns are kept, few are
  # stretched by `factor`, those between are interpolated.
  turns = rope.original_length * inverse / (2 * math.pi)
  ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
  keep = np.clip(ramp, 0, 1)
  return inverse * keep + inverse / rope.factor * (1 - keep)


def _yarn(rope, inverse, head_dim):
  def dimension(turns):  # the (fractional) pair that makes so many turns
    ratio = rope.original_length / (turns * 2 * math.pi)
    return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  high = high + 0.001 if low == high else high
  stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
  return inverse * (1 - stretch) + inverse / rope.factor * stretch


def rotation(rope: RopeConfig, head_dim: int, positions_BT: Array) -> tuple:
  """cos and sin of each position's angles, float32 [B, T, 1, head_dim / 2]."""
  frequencies = inverse_frequencies(rope, head_dim)[None, None, None, :]
  angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x_BTHh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns queries or keys [B, T, H, head_dim] by their positions' angles; keeps the dtype."""
  first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTHh.dtype)
