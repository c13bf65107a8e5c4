"""Noise "block": what a block sampler sees, clean text with a run of noise tokens after it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig
from refine_jax.errors import UserError
from refine_jax.objective.noise import anchored
from refine_jax.objective.noise.kind import Noised, response_lengths, response_offsets


@dataclasses.dataclass(frozen=True)
class BlockNoise:
  """Shows every response twice: as clean text, and in a copy next to it cut into blocks of drafts.

  A block stands for one window of the sampler: it sees the clean text before it and itself, and
  nothing else of the copy (attention.packed.beside). Of the block_size tokens that a pass can
  commit, the first is predicted by the clean text. The other block_size - 1 are each predicted by
  the draft before it, so a block is so many drafts. Blocks tile the response from a random phase
  on.

  The first round sees noise in the whole copy. A further one sees the first token of each block
  committed, then what the last round predicted, then, from an offset drawn anew for each block,
  noise again: the sampler's window after it has moved on.

  With config.anchors there is no copy, but so many such blocks for each row, drawn anew each step
  from all places of its responses.
  """

  config: NoiseConfig
  clean_text_inside: ClassVar[bool] = True

  def columns(self, length: int) -> int:
    return anchored.columns(self.config, length) if self.config.anchors else 2 * length

  def check(self) -> None:
    if self.config.block_size < 2:
      raise UserError(
        f"config.noise.block_size is {self.config.block_size}: such blocks have no drafts to train;"
        " make it at least 2."
      )
    if not 0 < self.config.offset_decay <= 1:
      raise UserError(
        f"config.noise.offset_decay is {self.config.offset_decay}; it must be in (0, 1]."
      )

  def corrupt(self, key: jax.Array, batch: Batch, noise_token: int) -> tuple[Batch, Noised]:
    """Noise as NoiseKind has it, for the batch [B, 2 T] of the rows and their copies.

    Prompts stand in the copy too, out of use. With config.anchors: see anchored.corrupt.
    """
    if self.config.anchors:
      return anchored.corrupt(self.config, key, batch, noise_token)
    drafts, length = self.config.block_size - 1, batch.ids.shape[1]
    offset = response_offsets(batch)

    def uniform(*salts):
      def draw(*values):
        example_key = key
        for value in values:
          example_key = jax.random.fold_in(example_key, value)
        return jax.random.uniform(example_key)

      return jax.vmap(jax.vmap(draw))(batch.example_ids, *salts)

    phase = (uniform() * drafts).astype(jnp.int32)
    index = (offset + phase) // drafts
    in_whole_block = (offset + phase) % drafts  # the offset, were the first block whole
    start = jnp.maximum(index * drafts - phase, 0)
    in_block = offset - start
    kept = 1 + (uniform(index) * drafts).astype(jnp.int32)
    response = batch.response_mask
    nowhere = jnp.zeros_like(response)
    again = response & (in_block > 0) & (in_whole_block >= kept)

    def both(first, second):
      return jnp.concatenate([jnp.asarray(first), second], axis=1)

    doubled = batch.map(lambda x: both(x, x))._replace(block_starts=batch.positions - in_block)
    weights = self.config.offset_decay ** in_block.astype(jnp.float32)
    return doubled, Noised(
      ids=both(batch.ids, jnp.where(response, noise_token, batch.ids)),
      is_noise=both(nowhere, response),
      later=both(batch.ids, jnp.where(again, noise_token, batch.ids)),
      later_is_noise=both(nowhere, again),
      refined=both(nowhere, response & (in_block > 0) & ~again),
      # The token after a draft; the response's first has none before it.
      trained=both(nowhere, response & (offset > 0)),
      clean=both(response, nowhere),
      weights=both(jnp.ones((len(batch.ids), length)), weights),
      rates=both(jnp.zeros((len(batch.ids), length)), response.astype(jnp.float32)),
    )

  def describe(self, token: str) -> str:
    size, decay = self.config.block_size, self.config.offset_decay
    weights = f", and each counts {decay:g} times as much as the one before it" if decay < 1 else ""
    return (
      f"The response is learnt in blocks of {size} tokens, as the sampler shows them: next to the"
      f" clean text, the {size - 1} drafts of each block are {token}{weights}."
    )

  def refinement(self, noise_token: int) -> dict:
    random = {"random_noise": True} if self.config.random else {}
    return {"noise_token": noise_token, "block_size": self.config.block_size} | random

  def buckets(self) -> tuple[str, ...]:
    return ()

  def bucket(self, noised: Noised) -> jax.Array:
    return jnp.zeros(noised.rates.shape, jnp.int32)


def block_noise(key: jax.Array, batch: Batch, block_size: int, noise_token: int) -> Noised:
  """One run of block_size response tokens an example, cut off where the response ends.

  For validation: after the clean text stands what a sampler would show, at an offset drawn
  uniformly from the response, and each further round sees all of it as predicted.
  """
  offset = response_offsets(batch)

  def draw(example):
    return jax.random.uniform(jax.random.fold_in(key, example))

  uniform = jax.vmap(jax.vmap(draw))(batch.example_ids)
  start = (uniform * response_lengths(batch)).astype(jnp.int32)
  block = batch.response_mask & (offset >= start) & (offset < start + block_size)
  rates = block.astype(jnp.float32)
  return Noised(
    ids=jnp.where(block, noise_token, batch.ids),
    is_noise=block,
    later=batch.ids,
    later_is_noise=jnp.zeros_like(block),
    refined=block,
    trained=block,
    clean=batch.response_mask,
    weights=jnp.ones_like(rates),
    rates=rates,
  )
