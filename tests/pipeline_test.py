"""Packed rows to batches, and the iterator whose state goes into a checkpoint."""

import ast
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import data_config

from refine_jax import data
from refine_jax.batch import Batch
from refine_jax.errors import UserError


def make_examples(count=50, seed=0, shortest=2, longest=20) -> data.Examples:
  """Example i has the token 1000 * (i + 1) + j at place j."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(shortest, longest + 1, count)
  tokens = [1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]
  return data.Examples(
    tokens=np.concatenate(tokens).astype(np.int32),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    prompt_lengths=rng.integers(1, lengths).astype(np.int32),
    source_rows=np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1),
    dropped={},
  )


def make_rows(examples=None, *, batch_size=4, total_epochs=3, seed=5, **changes) -> data.Rows:
  config = data_config(**{"max_length": 32} | changes)
  return data.train_rows(
    examples or make_examples(), config, batch_size=batch_size, total_epochs=total_epochs, seed=seed
  )


def all_batches(rows, accumulation=1, **where) -> list[Batch]:
  return list(data.train_iterator(rows, accumulation=accumulation, prefetch=2, **where))


def assert_same(a: Batch, b: Batch):
  for name, x, y in zip(Batch._fields, a, b, strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)


def flat(batches: list[Batch]) -> Batch:
  """Rows [N, T] of all batches."""
  return joined([b.map(lambda x: x.reshape(-1, x.shape[-1])) for b in batches], axis=0)


def joined(batches: list[Batch], axis: int) -> Batch:
  return Batch(
    *(None if x[0] is None else np.concatenate(x, axis) for x in zip(*batches, strict=True))
  )


def check_arrays(examples, rows: Batch) -> list[int]:
  """Against the examples, one by one; returns those that were met."""
  met = []
  for row in range(len(rows.ids)):
    used = rows.segment_ids[row] > 0
    assert np.all(np.diff(np.flatnonzero(~used)) == 1)  # padding is one stretch, at the end
    assert used.all() or not used[-1]
    for segment in range(1, rows.segment_ids[row].max() + 1):
      place = rows.segment_ids[row] == segment
      (index,) = set(rows.example_ids[row, place])
      met.append(int(index))
      ids = examples.example(index)
      np.testing.assert_array_equal(rows.ids[row, place], ids)
      np.testing.assert_array_equal(rows.positions[row, place], np.arange(len(ids)))
      response = np.arange(len(ids)) >= examples.prompt_lengths[index]
      np.testing.assert_array_equal(rows.response_mask[row, place], response)
    for name, padding in (("ids", 0), ("positions", 0), ("response_mask", 0), ("example_ids", -1)):
      assert np.all(getattr(rows, name)[row, ~used] == padding)
  return met


@pytest.mark.parametrize("pack", [True, False])
def test_every_epoch_has_every_example_once_whole_and_marked(pack):
  examples = make_examples()
  rows = make_rows(examples, pack=pack)
  arrays = flat(all_batches(rows))
  per_epoch = rows.packing.rows
  assert per_epoch == 50 or pack
  orders = []
  for epoch in range(3):
    part = arrays.map(lambda x, e=epoch: x[e * per_epoch : (e + 1) * per_epoch])
    orders.append(check_arrays(examples, part))
    assert sorted(orders[-1]) == list(range(50))
  assert len(set(map(tuple, orders))) == 3
  assert np.all(arrays.segment_ids[3 * per_epoch :] == 0)  # the last batch, filled up


def test_shapes_and_types():
  (batch, *_) = all_batches(make_rows(batch_size=8), accumulation=2)
  types = {k: (x.shape, x.dtype) for k, x in batch._asdict().items() if x is not None}
  shape = (2, 4, 32)
  assert types == {
    "ids": (shape, np.int32),
    "segment_ids": (shape, np.int32),
    "positions": (shape, np.int32),
    "response_mask": (shape, bool),
    "example_ids": (shape, np.int32),
  }


def test_counts():
  examples = make_examples()
  rows = make_rows(examples, total_epochs=3, batch_size=4)
  batches = all_batches(rows)
  assert len(batches) == rows.num_batches == -(-3 * rows.packing.rows // 4)
  assert rows.batches_per_epoch == rows.packing.rows / 4
  used = flat(batches).segment_ids[: len(rows)]
  assert rows.packing_efficiency == np.mean(used > 0)
  assert rows.max_segments == used.max()
  assert make_rows(examples, max_segments=2).max_segments == 2
  lengths = examples.lengths
  assert rows.mean_length == pytest.approx(np.repeat(lengths, lengths).mean())


@pytest.mark.parametrize("accumulation, process_count", [(1, 2), (2, 1), (2, 2), (4, 2), (1, 8)])
def test_a_global_batch_depends_on_neither_accumulation_nor_processes(accumulation, process_count):
  rows = make_rows(batch_size=8)
  whole = all_batches(rows)
  parts = [
    all_batches(rows, accumulation, held=part)
    for part in np.split(np.arange(8 // accumulation), process_count)
  ]
  for index, expected in enumerate(whole):
    both = joined([p[index] for p in parts], axis=1)
    assert both.ids.shape == (accumulation, 8 // accumulation, 32)
    assert_same(expected, both.map(lambda x: x.reshape(1, 8, 32)))


def test_order_depends_on_the_seed_alone():
  first, again, other = (flat(all_batches(make_rows(seed=s))) for s in (5, 5, 6))
  assert_same(first, again)
  assert not np.array_equal(first.example_ids, other.example_ids)


def test_more_epochs_change_nothing_of_the_first():
  short, long = (flat(all_batches(make_rows(total_epochs=n))) for n in (1, 4))
  count = make_rows().packing.rows
  assert_same(short.map(lambda x: x[:count]), long.map(lambda x: x[:count]))


@pytest.mark.parametrize("consumed", [0, 1, 7, 13])
def test_a_restored_iterator_goes_on_with_the_next_batch(consumed):
  rows = make_rows()
  expected = all_batches(rows, 2)
  assert len(expected) == 13
  iterator = data.train_iterator(rows, accumulation=2, prefetch=3)
  for _ in range(consumed):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  restored = data.train_iterator(make_rows(), accumulation=2, prefetch=1)
  restored.set_state(state)
  remaining = list(restored)
  assert len(remaining) == len(expected) - consumed
  for a, b in zip(remaining, expected[consumed:], strict=True):
    assert_same(a, b)


def test_set_state_goes_back_as_well():
  iterator = data.train_iterator(make_rows(), accumulation=1, prefetch=2)
  state = iterator.get_state()
  first = list(itertools.islice(iterator, 5))
  iterator.set_state(state)
  for a, b in zip(first, itertools.islice(iterator, 5), strict=True):
    assert_same(a, b)


@pytest.mark.parametrize("process_count", [1, 2])
def test_validation_is_every_example_once_in_the_same_order(process_count):
  examples = make_examples()
  rows = data.eval_rows(examples, data_config(max_length=32), batch_size=4)
  parts = [data.eval_batches(rows, held=part) for part in np.split(np.arange(4), process_count)]
  assert all(len(p) == rows.num_batches for p in parts)
  arrays = [flat(p) for p in parts]
  assert parts[0][0].ids.shape == (4 // process_count, 32)
  met = itertools.chain.from_iterable(check_arrays(examples, a) for a in arrays)
  assert sorted(met) == list(range(50))
  again = data.eval_rows(examples, data_config(max_length=32), batch_size=4)
  first = data.eval_batches(again, held=np.arange(4 // process_count))
  assert_same(arrays[0], flat(first))
  assert_same(arrays[0], flat(first))  # a second validation


def test_a_process_may_hold_any_rows_of_each_micro_batch():
  rows, held = make_rows(batch_size=8), np.array([0, 3])
  for whole, part in zip(all_batches(rows, 2), all_batches(rows, 2, held=held), strict=True):
    assert_same(part, whole.map(lambda x: x[:, held]))


def test_a_batch_that_does_not_split_is_the_users_error():
  with pytest.raises(UserError, match="A batch of 8 rows does not split"):
    data.train_iterator(make_rows(batch_size=8), accumulation=3)


def test_the_package_imports_only_what_is_below_it_and_no_jax():
  for path in Path(data.__file__).parent.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      else:
        continue
      for name in names:
        assert name.split(".")[0] not in ("jax", "flax"), path
        if name.startswith("refine_jax"):
          assert name.split(".")[1] in (
            "batch",
            "data",
            "config",
            "files",
            "quoting",
            "text",
            "errors",
          )
