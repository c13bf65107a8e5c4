"""Noise "block" with noise.anchors: a few blocks next to each row instead of a copy of it."""

import jax
import jax.numpy as jnp

from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig
from refine_jax.objective import draft_blocks
from refine_jax.objective.noise.kind import Noised


def columns(config: NoiseConfig, length: int) -> int:
  """Columns of the row and its blocks."""
  drafts = config.block_size - 1
  return length + draft_blocks.count_blocks(length, config.anchors, drafts) * config.block_size


def corrupt(
  config: NoiseConfig, key: jax.Array, batch: Batch, noise_token: int
) -> tuple[Batch, Noised]:
  """Noise as NoiseKind has it, for the batch [B, T + blocks * block_size].

  A block is what BlockNoise says, block_size - 1 drafts, but may start anywhere in a response. In
  one more column of it stands the token that its last draft is to predict; nothing sees it.
  """
  drafts, length = config.block_size - 1, batch.ids.shape[1]
  starts, exists = draft_blocks.draw_starts(key, batch, anchors=config.anchors, drafts=drafts)

  def of_row(x, where):
    return jnp.take_along_axis(jnp.asarray(x), where.reshape(len(where), -1), axis=1)

  size, blocks = config.block_size, starts.shape[1]
  step = jnp.arange(size)
  wanted = starts[..., None] + step[None, None]
  places = jnp.minimum(wanted, length - 1)
  repeated = jnp.broadcast_to(starts[..., None], places.shape)
  same = of_row(batch.segment_ids, places) == of_row(batch.segment_ids, repeated)
  inside = same & (exists[..., None] & (wanted < length)).reshape(same.shape)
  first = jnp.tile(step == 0, blocks)[None]

  def kept_of(example, start):
    block_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 3), example), start)
    return 1 + (jax.random.uniform(block_key) * drafts).astype(jnp.int32)

  examples, positions = (of_row(x, starts) for x in (batch.example_ids, batch.positions))
  kept = jnp.repeat(jax.vmap(jax.vmap(kept_of))(examples, positions), size, axis=1)
  steps = jnp.broadcast_to(jnp.tile(step, blocks)[None], inside.shape)
  again = inside & (steps >= kept)

  def both(x, y):
    return jnp.concatenate([jnp.asarray(x), y], axis=1)

  widened = batch.map(lambda x: both(x, of_row(x, places)))._replace(
    positions=both(batch.positions, jnp.repeat(positions, size, axis=1) + steps),
    response_mask=both(batch.response_mask, inside),
    # Of a block that is not there the keys that it sees are none.
    block_columns=jnp.where(exists[..., None], places, 0),
  )
  ids, response = widened.ids[:, length:], batch.response_mask
  nowhere, ones = jnp.zeros_like(response), jnp.ones(response.shape)
  return widened, Noised(
    ids=both(batch.ids, jnp.where(inside, noise_token, ids)),
    is_noise=both(nowhere, inside),
    later=both(batch.ids, jnp.where(again, noise_token, ids)),
    later_is_noise=both(nowhere, again),
    refined=both(nowhere, inside & ~first & ~again),
    trained=both(nowhere, inside & ~first),
    clean=both(response, jnp.zeros_like(inside)),
    weights=both(ones, config.offset_decay ** steps.astype(jnp.float32)),
    rates=both(jnp.zeros(response.shape), inside.astype(jnp.float32)),
  )
