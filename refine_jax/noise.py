"""What the first round sees instead of the response. Pure jnp; objective.py names the batch.

All draws depend on the key, the example and the position in it, not on the row that the example
was packed into.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_jax.config import NoiseConfig


class Noised(NamedTuple):
  """A noised batch.

  Attributes:
    ids: int32 [B, T].
    rates: float32 [B, T], the chance with which the token was noised.
    trained: bool [B, T], response tokens that the rounds are scored on.
    refined: bool [B, T], tokens that the next round sees as the last one predicted them.
  """

  ids: jax.Array
  rates: jax.Array
  trained: jax.Array
  refined: jax.Array


def add_noise(key, batch: dict, noise: NoiseConfig, noise_token: int) -> Noised:
  """Noise of the kind that the config names.

  "uniform" replaces each response token with its example's probability t, drawn uniformly from
  [noise_min, noise_max]; every round is scored on the whole response, and the next one sees all of
  it as predicted: the document's recipe.

  "block" is what a block sampler sees: a clean text that ends in a run of noise_token. One block of
  noise.block_size tokens an example, at a place drawn uniformly from its response. Nothing but the
  block is scored: before it stands clean text, which objective.clean_weight trains, and behind it
  text that has seen noise, which no sampler shows.
  """
  if noise.kind == "block":
    return block_noise(key, batch, noise.block_size, noise_token)
  rates_BT, draws_BT = _uniforms(key, batch, noise)
  response = batch["response_mask"]
  ids = jnp.where(response & (draws_BT < rates_BT), noise_token, batch["ids"])
  return Noised(ids, rates_BT, response, response)


def block_noise(key, batch: dict, block_size: int, noise_token: int) -> Noised:
  """One run of block_size response tokens an example, cut off where the response ends."""
  offset = response_offsets(batch)

  def draw(example):
    return jax.random.uniform(jax.random.fold_in(key, example))

  uniform = jax.vmap(jax.vmap(draw))(batch["example_ids"])
  start = (uniform * response_lengths(batch)).astype(jnp.int32)
  block = batch["response_mask"] & (offset >= start) & (offset < start + block_size)
  ids = jnp.where(block, noise_token, batch["ids"])
  return Noised(ids, block.astype(jnp.float32), block, block)


def response_lengths(batch: dict) -> jax.Array:
  """Response tokens in each token's example: int32 [B, T]."""
  return _count_by_segment(batch, batch["response_mask"])


def response_offsets(batch: dict) -> jax.Array:
  """Place of each token in its response, which ends its example: int32 [B, T], < 0 in prompts."""
  everything = _count_by_segment(batch, jnp.ones_like(batch["response_mask"]))
  return batch["positions"] - (everything - response_lengths(batch))


def _count_by_segment(batch, flags_BT):
  def count(segments, flags):
    sums = jnp.zeros(len(segments) + 1, jnp.int32).at[segments].add(flags.astype(jnp.int32))
    return sums[segments]

  return jax.vmap(count)(jnp.asarray(batch["segment_ids"]), jnp.asarray(flags_BT))


def _uniforms(key, batch, noise):
  def draw(example, position):
    example_key = jax.random.fold_in(key, example)
    rate = jax.random.uniform(example_key)
    return rate, jax.random.uniform(jax.random.fold_in(example_key, position + 1))

  rate, draw_BT = jax.vmap(jax.vmap(draw))(batch["example_ids"], batch["positions"])
  return noise.noise_min + (noise.noise_max - noise.noise_min) * rate, draw_BT
