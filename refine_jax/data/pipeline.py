"""Packed rows as batches: a random-access source, with Grain's threads and state around it."""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import numpy as np

from refine_jax.config import DataConfig
from refine_jax.data import packing as packing_lib
from refine_jax.data.packing import Packing
from refine_jax.data.tokenize import Examples

_READ_THREADS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """All rows of a run: epochs follow each other without a gap, each in its own order.

  Attributes:
    shuffle_seed: None: in the order of the packing, every epoch the same (validation).
  """

  examples: Examples
  packing: Packing
  length: int
  batch_size: int
  total_epochs: int
  shuffle_seed: int | None

  def __len__(self) -> int:
    return self.packing.rows * self.total_epochs

  @property
  def num_batches(self) -> int:
    """Of all epochs; the very last batch may hold empty rows."""
    return -(-len(self) // self.batch_size)

  @property
  def batches_per_epoch(self) -> float:
    return self.packing.rows / self.batch_size

  @property
  def packing_efficiency(self) -> float:
    """Real tokens over slots."""
    return len(self.examples.tokens) / (self.packing.rows * self.length)

  @property
  def max_segments(self) -> int:
    return self.packing.max_segments

  @property
  def mean_length(self) -> float:
    """Of the example that a token finds itself in: what attention's cost grows with."""
    lengths = self.examples.lengths.astype(np.float64)
    return float(np.sum(lengths**2) / np.sum(lengths))

  @functools.lru_cache(maxsize=2)  # noqa: B019  two epochs' permutations, freed with the process
  def _epoch(self, epoch: int):
    lengths = self.examples.lengths
    if self.shuffle_seed is None:
      return np.argsort(-lengths, kind="stable"), np.arange(self.packing.rows)
    return packing_lib.epoch_order(lengths, self.packing, seed=self.shuffle_seed, epoch=epoch)

  def members(self, index: int) -> np.ndarray:
    """The examples of a row."""
    epoch, row = divmod(index, self.packing.rows)
    by_rank, order = self._epoch(epoch)
    start, stop = self.packing.starts[order[row] : order[row] + 2]
    return by_rank[self.packing.ranks[start:stop]]

  def batch(self, indices) -> dict:
    """The arrays of objective.py, [len(indices), T]; rows past the end are empty."""
    shape = (len(indices), self.length)
    batch = {
      "ids": np.zeros(shape, np.int32),
      "segment_ids": np.zeros(shape, np.int32),
      "positions": np.zeros(shape, np.int32),
      "response_mask": np.zeros(shape, bool),
      "example_ids": np.full(shape, -1, np.int32),
    }
    for row, index in enumerate(indices):
      if index < len(self):
        self._fill({name: x[row] for name, x in batch.items()}, self.members(index))
    return batch

  def _fill(self, row: dict, members):
    start = 0
    for segment, member in enumerate(members, 1):
      ids = self.examples.example(member)
      span = slice(start, start + len(ids))
      row["ids"][span] = ids
      row["segment_ids"][span] = segment
      row["positions"][span] = np.arange(len(ids))
      row["response_mask"][start + self.examples.prompt_lengths[member] : span.stop] = True
      row["example_ids"][span] = member
      start = span.stop


def train_rows(
  examples: Examples, data: DataConfig, *, batch_size: int, total_epochs: int, seed: int
) -> Rows:
  """The rows of all epochs, shuffled by (seed, epoch)."""
  return Rows(examples, _pack(examples, data), data.max_length, batch_size, total_epochs, seed)


def _pack(examples, data):
  limit = data.max_segments if data.pack else 1
  return packing_lib.pack(examples.lengths, data.max_length, limit)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
  """Batch i as [A, B_local, T]: this process's part of each micro-batch."""

  rows: Rows
  accumulation: int
  process_index: int
  process_count: int

  def __len__(self) -> int:
    return self.rows.num_batches

  def __getitem__(self, index: int) -> dict:
    size = self.rows.batch_size
    # The global batch is the same however it is split: rows of a micro-batch lie together, and
    # each process takes a contiguous part of every micro-batch.
    indices = (index * size + np.arange(size)).reshape(self.accumulation, self.process_count, -1)
    mine = indices[:, self.process_index]
    batch = self.rows.batch(mine.ravel())
    return {name: x.reshape(*mine.shape, -1) for name, x in batch.items()}


def train_iterator(
  rows: Rows,
  *,
  batch_size: int,
  accumulation: int,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 4,
):
  """A Grain iterator over batches [A, B_local, T], read ahead by threads.

  Its state is the index of the next batch, so it goes on exactly where it was saved.
  """
  assert batch_size == rows.batch_size
  source = _Batches(rows, accumulation, process_index, process_count)
  options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=prefetch)
  return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(
  examples: Examples,
  data: DataConfig,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict]:
  """Every example once, in fixed order, as batches [B_local, T]; the last may hold empty rows."""
  rows = Rows(examples, _pack(examples, data), data.max_length, batch_size, 1, None)
  source = _Batches(rows, 1, process_index, process_count)
  for index in range(len(source)):
    yield {name: x[0] for name, x in source[index].items()}
