"""Where blocks of drafts stand, what they see, and what they are to predict."""

import jax
import numpy as np
import pytest
import train_fixtures as tiny

from refine_jax.batch import Batch
from refine_jax.objective import draft_blocks

DRAFTS = 4


def draw(batch, anchors=0, seed=0, **options):
  options = {"drafts": DRAFTS, "noise_token": tiny.NOISE_TOKEN} | options
  blocks = draft_blocks.draw(jax.random.key(seed), batch, anchors=anchors, **options)
  return jax.tree.map(np.asarray, blocks)


@pytest.mark.parametrize("anchors", [0, 5])
def test_a_draft_predicts_the_token_after_its_place_and_sees_its_example_before_the_block(anchors):
  batch = tiny.packed_batch()
  blocks = draw(batch, anchors)
  assert blocks.columns.shape[1] == draft_blocks.count_blocks(48, anchors, DRAFTS) * DRAFTS
  assert np.any(blocks.weights)
  for b, q in zip(*np.nonzero(blocks.weights), strict=True):
    column, start = blocks.columns[b, q], blocks.columns[b, q // DRAFTS * DRAFTS]
    assert column == start + q % DRAFTS
    assert batch.response_mask[b, column] and batch.response_mask[b, column + 1]
    assert batch.segment_ids[b, column] == batch.segment_ids[b, column + 1]
    assert blocks.targets[b, q] == batch.ids[b, column + 1]
    assert blocks.tokens.positions[b, q] == batch.positions[b, column]
    assert blocks.end[b, q] == start
    assert batch.positions[b, blocks.first[b, q]] == 0
    assert batch.segment_ids[b, blocks.first[b, q]] == batch.segment_ids[b, start]


def test_tiles_cover_every_token_that_a_response_has_after_its_first():
  batch = tiny.packed_batch()
  blocks = draw(batch)
  for b in range(len(batch.ids)):
    predicted = set(blocks.columns[b][blocks.weights[b] > 0] + 1)
    response = batch.response_mask[b]
    first = response & (np.roll(response, 1) == 0)
    same = np.roll(batch.segment_ids[b], 1) != batch.segment_ids[b]
    assert predicted == set(np.flatnonzero(response & ~first & ~same))


def test_the_most_tiles_of_a_response_are_room_enough_and_sometimes_needed():
  lengths, row = np.arange(1, 31), np.arange(48)[None]
  inside = row < 3 + lengths[:, None]
  batch = Batch(
    ids=np.zeros(inside.shape, np.int32),
    segment_ids=inside.astype(np.int32),
    positions=np.where(inside, row, 0).astype(np.int32),
    response_mask=inside & (row >= 3),
    example_ids=np.where(inside, lengths[:, None], -1).astype(np.int32),
  )
  most, counts = draft_blocks.most_tiles(lengths, DRAFTS), []
  for seed in range(12):
    roomy, tight = (draw(batch, seed=seed, most=n).weights for n in (None, int(most.max())))
    assert tight.shape[1] < roomy.shape[1]
    np.testing.assert_array_equal(tight.sum(axis=1), roomy.sum(axis=1))
    counts.append(np.sum(tight[:, ::DRAFTS] > 0, axis=1))
  assert np.all(np.max(counts, axis=0) == most)


@pytest.mark.parametrize("random_below", [0, 37])
def test_blocks_do_not_depend_on_how_examples_are_packed(random_below):
  packed, rows = tiny.packed_batch(), tiny.unpacked_batch()

  def by_example(batch):
    blocks = draw(batch, random_below=random_below)
    return {
      (
        int(batch.example_ids[b, blocks.columns[b, q]]),
        int(blocks.tokens.positions[b, q]),
        q % DRAFTS,
        int(blocks.tokens.ids[b, q]),
      )
      for b, q in zip(*np.nonzero(blocks.weights), strict=True)
    }

  assert by_example(packed) == by_example(rows)


def test_anchors_differ_by_step_and_lie_in_responses():
  batch = tiny.packed_batch()
  starts = [draw(batch, 3, seed).columns[:, ::DRAFTS] for seed in range(2)]
  assert np.any(starts[0] != starts[1])


def test_a_row_without_a_response_has_no_block():
  batch = tiny.packed_batch()
  batch = batch._replace(response_mask=np.zeros_like(batch.response_mask))
  blocks = draw(batch, 3)
  assert not np.any(blocks.weights) and not np.any(blocks.end > blocks.first)


def test_random_noise_is_uniform_over_the_vocabulary():
  ids = draw(tiny.packed_batch(), random_below=37).tokens.ids
  assert len(np.unique(ids)) > 25 and ids.min() >= 0 and ids.max() < 37


def test_later_drafts_count_less():
  blocks = draw(tiny.packed_batch(), decay=0.5)
  steps = np.arange(blocks.weights.shape[1]) % DRAFTS
  used = blocks.weights > 0
  np.testing.assert_allclose(blocks.weights[used], np.broadcast_to(0.5**steps, used.shape)[used])
