"""Noise "uniform": each response token by itself, with a rate drawn for each example."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig
from refine_jax.errors import UserError
from refine_jax.objective.noise.kind import NOISE_BUCKETS, Noised


@dataclasses.dataclass(frozen=True)
class UniformNoise:
  """Replaces each response token with its example's probability t.

  t is drawn uniformly from [noise_min, noise_max]. Every round is scored on the whole response,
  and the next one sees all of it as predicted.
  """

  config: NoiseConfig
  clean_text_inside: ClassVar[bool] = False

  def columns(self, length: int) -> int:
    return length

  def check(self) -> None:
    low, high = self.config.noise_min, self.config.noise_max
    if not 0 <= low <= high <= 1:
      raise UserError(
        f"config.noise has noise_min={low} and noise_max={high};"
        " they must satisfy 0 <= noise_min <= noise_max <= 1."
      )

  def corrupt(self, key: jax.Array, batch: Batch, noise_token: int) -> tuple[Batch, Noised]:
    rates_BT, draws_BT = self._draw(key, batch)
    response = batch.response_mask
    is_noise = response & (draws_BT < rates_BT)
    ids = jnp.where(is_noise, noise_token, batch.ids)
    return batch, Noised(
      ids=ids,
      is_noise=is_noise,
      later=batch.ids,
      later_is_noise=jnp.zeros_like(response),
      refined=response,
      trained=response,
      clean=response,
      weights=jnp.ones(ids.shape, jnp.float32),
      rates=rates_BT,
    )

  def _draw(self, key, batch):
    def draw(example, position):
      example_key = jax.random.fold_in(key, example)
      rate = jax.random.uniform(example_key)
      return rate, jax.random.uniform(jax.random.fold_in(example_key, position + 1))

    rate, draws_BT = jax.vmap(jax.vmap(draw))(batch.example_ids, batch.positions)
    low, high = self.config.noise_min, self.config.noise_max
    return low + (high - low) * rate, draws_BT

  def describe(self, token: str) -> str:
    low, high = self.config.noise_min, self.config.noise_max
    return (
      f"Response tokens are replaced by {token}, each with its example's rate, drawn uniformly from"
      f" [{low:g}, {high:g}]."
    )

  def refinement(self, noise_token: int) -> dict:
    return {"noise_token": noise_token, "block_size": None}

  def buckets(self) -> tuple[str, ...]:
    """Equal parts of [noise_min, noise_max]; an example counts by its rate."""
    edges = np.linspace(self.config.noise_min, self.config.noise_max, NOISE_BUCKETS + 1)
    return tuple(f"noise_{a:.2f}-{b:.2f}" for a, b in zip(edges[:-1], edges[1:], strict=True))

  def bucket(self, noised: Noised) -> jax.Array:
    width = max(self.config.noise_max - self.config.noise_min, 1e-6) / NOISE_BUCKETS
    bucket = ((noised.rates - self.config.noise_min) / width).astype(jnp.int32)
    return jnp.clip(bucket, 0, NOISE_BUCKETS - 1)
