"""Which examples share a row: best fit, longest first.

The shape of the packing (how many of which lengths each row holds) depends on the lengths alone,
so every epoch has the same number of rows, the length of a run is known before it starts, and any
row of any epoch is found without packing those before it. Which of the examples of one length goes
where, and the order of the rows, is drawn anew for each epoch.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
  """Rows of ranks; rank r is the r-th longest example.

  Attributes:
    ranks: int64 [count], row after row.
    starts: int64 [rows + 1], where each row's ranks begin.
  """

  ranks: np.ndarray
  starts: np.ndarray

  @property
  def rows(self) -> int:
    return len(self.starts) - 1

  @property
  def max_segments(self) -> int:
    return int(np.diff(self.starts).max(initial=1))


def pack(lengths: np.ndarray, max_length: int, max_segments: int) -> Packing:
  """Best-fit decreasing (Johnson 1973), with at most max_segments examples a row.

  Args:
    lengths: of each example, none above max_length and none 0.
    max_length: tokens a row.
    max_segments: examples a row; 1 keeps the examples in their order.
  """
  if max_segments == 1:
    count = len(lengths)
    return Packing(np.arange(count), np.arange(count + 1))
  descending = np.sort(lengths)[::-1].tolist()
  rows = []
  # Open rows by the room they have; bit r of `rooms` says that open[r] is not empty, so the
  # smallest room that fits is found by a shift and a lowest set bit.
  open_rows, rooms = [[] for _ in range(max_length + 1)], 0
  for rank, length in enumerate(descending):
    fitting = rooms >> length
    if fitting:
      room = length + (fitting & -fitting).bit_length() - 1
      row = open_rows[room].pop()
      if not open_rows[room]:
        rooms &= ~(1 << room)
      rows[row].append(rank)
    else:
      room, row = max_length, len(rows)
      rows.append([rank])
    left = room - length
    if left and len(rows[row]) < max_segments:
      open_rows[left].append(row)
      rooms |= 1 << left
  counts = np.array([len(row) for row in rows])
  starts = np.concatenate([[0], np.cumsum(counts)])
  return Packing(np.concatenate([np.asarray(row) for row in rows]), starts)


def epoch_order(
  lengths: np.ndarray, packing: Packing, *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
  """An epoch's draw.

  Args:
    lengths: as given to `pack`.

  Returns:
    examples by rank, and the order of the rows; both int64 permutations.
  """
  generator = np.random.default_rng([seed, epoch])
  shuffled = generator.permutation(len(lengths))
  by_rank = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
  return by_rank, generator.permutation(packing.rows)
