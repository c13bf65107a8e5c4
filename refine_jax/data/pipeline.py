"""Packed rows as batches: a random-access source, with Grain's threads and state around it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import grain
import numpy as np

from refine_jax.batch import Batch
from refine_jax.config import DataConfig
from refine_jax.data import packing as packing_lib
from refine_jax.data.packing import Packing
from refine_jax.data.store import Examples
from refine_jax.errors import UserError

_READ_THREADS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """All rows of a run: epochs follow each other without a gap, each in its own order.

  Attributes:
    length: tokens a row.
    batch_size: rows in a global batch.
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
    """Counts the batches of all epochs; the very last one may hold empty rows."""
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
    """Mean over tokens of the length of the token's example; attention's cost grows with it."""
    lengths = self.examples.lengths.astype(np.float64)
    return float(np.sum(lengths**2) / np.sum(lengths))

  def most_in_a_row(self, per_example: np.ndarray) -> int:
    """The most that these numbers of examples may sum to in a row, whatever an epoch draws."""
    lengths = self.examples.lengths
    # Examples of one length change places, so each counts as the greatest of them.
    greatest = np.zeros(int(lengths.max(initial=0)) + 1, np.int64)
    np.maximum.at(greatest, lengths, per_example)
    by_rank = greatest[np.sort(lengths)[::-1]]
    sums = np.add.reduceat(by_rank[self.packing.ranks], self.packing.starts[:-1])
    return int(sums.max(initial=0))

  @functools.cached_property
  def _epoch(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    # Batches around the end of an epoch need two epochs' permutations.
    return functools.lru_cache(maxsize=2)(self._draw)

  def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = self.examples.lengths
    if self.shuffle_seed is None:
      return np.argsort(-lengths, kind="stable"), np.arange(self.packing.rows)
    return packing_lib.epoch_order(lengths, self.packing, seed=self.shuffle_seed, epoch=epoch)

  def members(self, index: int) -> np.ndarray:
    """The examples of row `index`, counted over all epochs."""
    epoch, row = divmod(index, self.packing.rows)
    by_rank, order = self._epoch(epoch)
    start, stop = self.packing.starts[order[row] : order[row] + 2]
    return by_rank[self.packing.ranks[start:stop]]

  def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
    """Rows as numpy arrays [len(indices), T]; those past the end are empty."""
    shape = (len(indices), self.length)
    batch = Batch(
      ids=np.zeros(shape, np.int32),
      segment_ids=np.zeros(shape, np.int32),
      positions=np.zeros(shape, np.int32),
      response_mask=np.zeros(shape, bool),
      example_ids=np.full(shape, -1, np.int32),
    )
    for row, index in enumerate(indices):
      if index < len(self):
        self._fill(batch.map(lambda x, row=row: x[row]), self.members(index))
    return batch

  def _fill(self, row: Batch, members):
    start = 0
    for segment, member in enumerate(members, 1):
      ids = self.examples.example(member)
      span = slice(start, start + len(ids))
      row.ids[span] = ids
      row.segment_ids[span] = segment
      row.positions[span] = np.arange(len(ids))
      row.response_mask[start + self.examples.prompt_lengths[member] : span.stop] = True
      row.example_ids[span] = member
      start = span.stop


def train_rows(
  examples: Examples, data: DataConfig, *, batch_size: int, total_epochs: int, seed: int
) -> Rows:
  """The rows of all epochs, shuffled by (seed, epoch)."""
  return Rows(examples, _pack(examples, data), data.max_length, batch_size, total_epochs, seed)


def eval_rows(examples: Examples, data: DataConfig, *, batch_size: int) -> Rows:
  """Every example once, in an order that is always the same."""
  return Rows(examples, _pack(examples, data), data.max_length, batch_size, 1, None)


def _pack(examples: Examples, data: DataConfig) -> Packing:
  limit = data.max_segments if data.pack else 1
  return packing_lib.pack(examples.lengths, data.max_length, limit)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches(Sequence):
  """Batch i as [A, B_local, T]: the rows of each micro-batch that this process holds."""

  rows: Rows
  accumulation: int
  held: np.ndarray | None

  def __post_init__(self) -> None:
    if self.rows.batch_size % self.accumulation:
      raise UserError(
        f"A batch of {self.rows.batch_size} rows does not split into accumulation="
        f"{self.accumulation} equal parts; change config.optim.batch_size."
      )

  def __len__(self) -> int:
    return self.rows.num_batches

  def __getitem__(self, index: int) -> Batch:
    if not 0 <= index < len(self):
      raise IndexError(index)
    size = self.rows.batch_size
    # The global batch is the same however it is split: rows of a micro-batch lie together, and
    # each process takes those of every micro-batch that its devices hold.
    indices = (index * size + np.arange(size)).reshape(self.accumulation, -1)
    mine = indices if self.held is None else indices[:, self.held]
    return self.rows.batch(mine.ravel()).map(lambda x: x.reshape(*mine.shape, -1))


class _EvalBatches(_Batches):
  """Without the axis of the accumulation, [B_local, T]."""

  def __getitem__(self, index: int) -> Batch:
    return super().__getitem__(index).map(lambda x: x[0])


def train_iterator(
  rows: Rows,
  *,
  accumulation: int,
  held: np.ndarray | None = None,
  prefetch: int = 4,
) -> grain.DatasetIterator:
  """A Grain iterator over batches, `Rows.batch` as [A, B_local, T], read ahead by threads.

  Its state is the index of the next batch, so it goes on exactly where it was saved. What a
  global batch holds depends neither on the accumulation nor on the processes: global batch i is
  rows i * batch_size up to (i + 1) * batch_size, in micro-batches of equal size one after another.

  Args:
    accumulation: A, micro-batches a step.
    held: the B_local rows of each micro-batch that this process holds, counted from its first
      (sharding.local_rows); None: all of them.
    prefetch: batches to make ahead.

  Raises:
    UserError: the batch does not split evenly.
  """
  source = _Batches(rows, accumulation, held)
  threads = min(_READ_THREADS, prefetch)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
  return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(rows: Rows, *, held: np.ndarray | None = None) -> Sequence[Batch]:
  """`Rows.batch` as [B_local, T]; the last batch may hold empty rows.

  Args:
    held: as for `train_iterator`.
  """
  return _EvalBatches(rows, 1, held)
