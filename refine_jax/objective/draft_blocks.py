"""Blocks of draft tokens after chosen places of the clean text: what a gated adapter learns from.

A block stands for one branch of the sampler. Its noise tokens stand in the places from its start
on, see the clean text before the start and each other, and each predicts the token after its own
place. Blocks are a stream of their own next to the clean rows, so a row of any length may have few
of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.batch import Batch
from refine_jax.objective.noise.kind import random_ids, response_lengths, response_offsets


class DraftBlocks(NamedTuple):
  """Noise tokens of all blocks of some rows, side by side: [B, Q], Q blocks times drafts.

  Attributes:
    tokens: their ids and positions.
    columns: int32, the column of the clean row at the place of each.
    first, end: int32, the columns of the clean text that each sees, from first on, before end.
    targets: int32, the token after each place.
    weights: float32, how much the prediction of each counts; 0 where there is none to make.
  """

  tokens: Batch
  columns: jax.Array
  first: jax.Array
  end: jax.Array
  targets: jax.Array
  weights: jax.Array


def count_blocks(length: int, anchors: int, drafts: int, most: int | None = None) -> int:
  """Blocks that stand next to a row: `anchors`, or for 0 as many as tile it.

  Args:
    most: tiles of the row with the most of them, where it is known: no row has room for more.
  """
  if anchors:
    return min(anchors, length)
  tiles = -(-length // drafts)
  return tiles if most is None else max(min(tiles, most), 1)


def most_tiles(response_lengths: np.ndarray, drafts: int) -> np.ndarray:
  """The most blocks that tile responses of these lengths, whatever their phases, int64 likewise."""
  # One starts with the response, the others anywhere after it; the last token has no successor.
  tiles = 1 + -(-(response_lengths - 2) // drafts)
  return np.where(response_lengths < 2, 0, tiles).astype(np.int64)


def draw(
  key: jax.Array,
  batch: Batch,
  *,
  anchors: int,
  drafts: int,
  noise_token: int,
  random_below: int = 0,
  decay: float = 1.0,
  most: int | None = None,
) -> DraftBlocks:
  """Draws blocks for the responses of a batch [B, T].

  All draws depend on the key, the example and the position in it, not on the row that the example
  was packed into; only which of too many blocks are left out depends on the row.

  Args:
    anchors: blocks for each row, at places of its responses that are all equally likely: an example
      has them in proportion to its response. 0: blocks tile each response from a random phase on,
      and one starts with it, as the sampler's first drafts do; it overlaps the next, and what both
      predict counts twice. Where a row has room for fewer, a random part of them is left out.
    drafts: noise tokens of a block.
    noise_token: the id of a noise token.
    random_below: where positive, ids are drawn uniformly below it instead (the noise of SGLang's
      and vLLM's UNO decoders).
    decay: how much a draft counts of the one before it in its block.
    most: see count_blocks.

  Returns:
    blocks in the order of the row, [B, count_blocks * drafts].
  """
  length = batch.ids.shape[1]
  starts, exists = draw_starts(key, batch, anchors=anchors, drafts=drafts, most=most)
  blocks = starts.shape[1]
  starts, exists = (jnp.repeat(x, drafts, axis=1) for x in (starts, exists))
  step = jnp.tile(jnp.arange(drafts), blocks)[None, :]
  columns = jnp.minimum(starts + step, length - 1)

  def at(x, where):
    return jnp.take_along_axis(jnp.asarray(x), where, axis=1)

  after = jnp.minimum(columns + 1, length - 1)
  same = at(batch.segment_ids, after) == at(batch.segment_ids, starts)
  inside = (starts + step + 1 < length) & same & exists
  start_positions = at(batch.positions, starts)
  ids = jnp.full(columns.shape, noise_token, jnp.int32)
  if random_below:
    salts = (at(batch.example_ids, starts), start_positions, jnp.broadcast_to(step, columns.shape))
    ids = random_ids(jax.random.fold_in(key, 2), *salts, below=random_below)
  return DraftBlocks(
    tokens=Batch(ids, start_positions + step, is_noise=jnp.ones(columns.shape, bool)),
    columns=columns,
    first=jnp.where(exists, starts - start_positions, 0),
    end=jnp.where(exists, starts, 0),
    targets=at(batch.ids, after),
    weights=inside * jnp.float32(decay) ** step,
  )


def draw_starts(
  key: jax.Array, batch: Batch, *, anchors: int, drafts: int, most: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Draws where the blocks of a batch [B, T] start.

  Args: those of `draw`.

  Returns:
    int32 [B, blocks], a column of the row for each block, in order; bool likewise, whether there is
    such a block (if not, the column is the last).
  """
  length = batch.ids.shape[1]
  blocks = count_blocks(length, anchors, drafts, most)
  uniform = _uniform(key, batch)
  offsets, lengths = response_offsets(batch), response_lengths(batch)
  # The response's last token has no successor to predict.
  candidates = batch.response_mask & (offsets < lengths - 1)
  if not anchors:
    phase = (_uniform(jax.random.fold_in(key, 1), batch, per_example=True) * drafts).astype(int)
    candidates &= ((offsets + phase) % drafts == 0) | (offsets == 0)
  chosen, starts = jax.lax.top_k(jnp.where(candidates, uniform, -1.0), blocks)
  # In the row's order, so that neighbours see nearly the same keys.
  starts = jnp.sort(jnp.where(chosen >= 0, starts, length), axis=1)
  return jnp.minimum(starts, length - 1), starts < length


def _uniform(key, batch, *, per_example=False):
  """A number in [0, 1) for each token, of its example and its position (or of the example)."""

  def one(example, position):
    example_key = jax.random.fold_in(key, example)
    return jax.random.uniform(jax.random.fold_in(example_key, position))

  positions = jnp.zeros_like(batch.positions) if per_example else batch.positions
  return jax.vmap(jax.vmap(one))(batch.example_ids, positions)
