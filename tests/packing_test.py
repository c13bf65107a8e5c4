"""Which examples share a row."""

import numpy as np
import pytest

from refine_jax.data import packing


def draw_lengths(count, mean, longest, seed=0):
  lengths = np.random.default_rng(seed).lognormal(np.log(mean) - 0.3, 0.8, count)
  return np.clip(lengths.astype(np.int64), 2, longest)


def rows_of(lengths, result, seed=0, epoch=0):
  by_rank, order = packing.epoch_order(lengths, result, seed=seed, epoch=epoch)
  return [by_rank[result.ranks[result.starts[r] : result.starts[r + 1]]] for r in order]


@pytest.mark.parametrize("max_segments", [1, 3, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_example_once_and_no_row_over_its_limits(max_segments, seed):
  lengths = draw_lengths(500, 40, 128, seed)
  result = packing.pack(lengths, 128, max_segments)
  for epoch in range(3):
    rows = rows_of(lengths, result, seed, epoch)
    assert sorted(np.concatenate(rows)) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 128
    assert max(map(len, rows)) == result.max_segments <= max_segments


def test_one_example_a_row():
  result = packing.pack(np.array([5, 3, 9]), 16, 1)
  assert result.rows == 3 and result.max_segments == 1


@pytest.mark.parametrize("count", [500, 20_000])
def test_hundred_token_examples_fill_rows_of_512(count):
  lengths = draw_lengths(count, 100, 512)
  result = packing.pack(lengths, 512, 64)
  assert lengths.sum() / (result.rows * 512) >= 0.95


def test_full_rows_close_exactly():
  """The best fit takes the room that is exactly right."""
  result = packing.pack(np.array([7, 3, 6, 4, 5, 5]), 10, 64)
  assert result.rows == 3


def test_an_epochs_order_depends_on_seed_and_epoch_alone():
  lengths = draw_lengths(300, 20, 64)
  result = packing.pack(lengths, 64, 64)

  def flat(seed, epoch):
    return np.concatenate(rows_of(lengths, result, seed, epoch)).tolist()

  assert flat(1, 2) == flat(1, 2)
  assert len({tuple(flat(*which)) for which in [(1, 2), (2, 1), (1, 3), (0, 2)]}) == 4


def test_epochs_put_other_examples_together():
  lengths = np.full(64, 8)
  result = packing.pack(lengths, 32, 64)
  first, second = ({frozenset(r) for r in rows_of(lengths, result, epoch=e)} for e in (0, 1))
  assert len(first & second) <= 2


def test_order_is_drawn_over_the_whole_set():
  """The first tenth of an epoch comes from everywhere, not from the first rows of the file."""
  lengths = draw_lengths(2000, 20, 64)
  result = packing.pack(lengths, 64, 64)
  start = np.concatenate(rows_of(lengths, result)[: result.rows // 10])
  assert 800 < start.mean() < 1200 and np.std(start) > 400
  assert 0.8 < lengths[start].mean() / lengths.mean() < 1.25
