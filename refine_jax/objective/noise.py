"""What the rounds see instead of the response. Pure jnp; objective.py names the batch.

All draws depend on the key, the example and the position in it, not on the row that the example
was packed into.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_jax.config import NoiseConfig


class Noised(NamedTuple):
  """A noised batch; S columns: T, or 2 T where blocks stand beside the clean text.

  Attributes:
    ids: int32 [B, S], what the first round sees.
    later: int32 [B, S], what further rounds see at places that are not refined.
    refined: bool [B, S], tokens that a further round sees as the last one predicted them.
    trained: bool [B, S], response tokens that the rounds are scored on.
    weights: float32 [B, S], how much the prediction made at each place counts.
    rates: float32 [B, S], the chance with which the token was noised.
  """

  ids: jax.Array
  later: jax.Array
  refined: jax.Array
  trained: jax.Array
  weights: jax.Array
  rates: jax.Array


def columns_per_token(noise: NoiseConfig) -> int:
  """How many columns of a noised batch stand for one of the batch that it was made from."""
  return 2 if noise.kind == "block" else 1


def add_noise(key, batch: dict, noise: NoiseConfig, noise_token: int) -> tuple[dict, Noised]:
  """Noise of the kind that the config names.

  "uniform" replaces each response token with its example's probability t, drawn uniformly from
  [noise_min, noise_max]; every round is scored on the whole response, and the next one sees all of
  it as predicted: the document's recipe.

  "block" is what a block sampler sees, see `blocks_beside`.

  Returns:
    the batch that the noised ids belong to, and these.
  """
  if noise.kind == "block":
    return blocks_beside(key, batch, noise, noise_token)
  rates_BT, draws_BT = _uniforms(key, batch, noise)
  response = batch["response_mask"]
  ids = jnp.where(response & (draws_BT < rates_BT), noise_token, batch["ids"])
  weights = jnp.ones(ids.shape, jnp.float32)
  return batch, Noised(ids, batch["ids"], response, response, weights, rates_BT)


def blocks_beside(key, batch: dict, noise: NoiseConfig, noise_token: int) -> tuple[dict, Noised]:
  """Every response twice: as clean text, and beside it cut into blocks of drafts.

  A block stands for one window of the sampler: it sees the clean text before it and itself, and
  nothing else of the copy (attention.beside). Of the block_size tokens that a pass can commit, the
  first is predicted by the clean text; the other block_size - 1 each by the draft before it, so a
  block is so many drafts. Blocks tile the response from a random phase on.

  The first round sees noise in all places. A further one sees the first place committed, then what
  the last round predicted, then, from a place drawn anew for each block, noise again: the sampler's
  window after it has moved on.

  Returns:
    a batch [B, 2 T] with the key "block_starts" (int32 [B, T]: where, in its example, the block of
    each token of the copy begins), and its noise. Prompts stand in the copy too, out of use.
  """
  drafts, length = noise.block_size - 1, batch["ids"].shape[1]
  offset = response_offsets(batch)

  def uniform(*salts):
    def draw(*values):
      example_key = key
      for value in values:
        example_key = jax.random.fold_in(example_key, value)
      return jax.random.uniform(example_key)

    return jax.vmap(jax.vmap(draw))(batch["example_ids"], *salts)

  phase = (uniform() * drafts).astype(jnp.int32)
  index = (offset + phase) // drafts
  place = (offset + phase) % drafts  # in its block, were the first one whole
  start = jnp.maximum(index * drafts - phase, 0)
  in_block = offset - start
  kept = 1 + (uniform(index) * drafts).astype(jnp.int32)
  response = batch["response_mask"]
  clean = jnp.zeros_like(response)
  ids = jnp.where(response, noise_token, batch["ids"])
  again = response & (in_block > 0) & (place >= kept)

  def both(first, second):
    return jnp.concatenate([jnp.asarray(first), second], axis=1)

  doubled = {name: both(x, x) for name, x in batch.items()}
  doubled["block_starts"] = batch["positions"] - in_block
  weights = noise.offset_decay ** in_block.astype(jnp.float32)
  return doubled, Noised(
    ids=both(batch["ids"], ids),
    later=both(batch["ids"], jnp.where(again, noise_token, batch["ids"])),
    refined=both(clean, response & (in_block > 0) & ~again),
    # The token after a draft; the response's first has none before it.
    trained=both(clean, response & (offset > 0)),
    weights=both(jnp.ones((len(ids), length)), weights),
    rates=both(jnp.zeros((len(ids), length)), response.astype(jnp.float32)),
  )


def block_noise(key, batch: dict, block_size: int, noise_token: int) -> Noised:
  """One run of block_size response tokens an example, cut off where the response ends.

  For validation: behind the clean text stands what a sampler would show, at a place drawn
  uniformly from the response, and each further round sees all of it as predicted.
  """
  offset = response_offsets(batch)

  def draw(example):
    return jax.random.uniform(jax.random.fold_in(key, example))

  uniform = jax.vmap(jax.vmap(draw))(batch["example_ids"])
  start = (uniform * response_lengths(batch)).astype(jnp.int32)
  block = batch["response_mask"] & (offset >= start) & (offset < start + block_size)
  ids = jnp.where(block, noise_token, batch["ids"])
  rates = block.astype(jnp.float32)
  return Noised(ids, batch["ids"], block, block, jnp.ones_like(rates), rates)


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
