"""The one struct for tokens on their way through the model."""

from collections.abc import Callable
from typing import Any, NamedTuple

# A numpy or a jax array, or None in a field that may lack one: what makes a batch on the host loads
# no jax, and which fields a batch has is known where it is used.
Array = Any


class Batch(NamedTuple):
  """Rows of tokens: a training batch, a round's input, or what one decoding pass runs over.

  The data pipeline makes batches, noise kinds and rounds replace their ids, the sampler makes one
  for each pass. Shapes are [B, S]: S is the row length T, or 2 T where a copy of each row stands
  next to it (`block_starts`), or more by a few blocks (`block_columns`). Micro-batches lead with
  one more axis.

  Attributes:
    ids: int32, 0 on padding.
    positions: int32, from 0 in each example.
    segment_ids: int32, 1 and up for the examples of a packed row, 0 on padding. None in decoding,
      where a row is one sequence.
    response_mask: bool, true on response tokens and their EOS. None where no loss is taken.
    example_ids: int32, index of the example in the data set, -1 on padding. None likewise.
    is_noise: bool, true where the id is a noise token put there for the model to replace, false
      for text and for drafts that were predicted. None: no token is noise.
    block_starts: int32 [B, T], the position in its example at which the block of each token of the
      copy begins. None: there is no copy.
    block_columns: int32 [B, blocks, N], the columns of the row at whose places the tokens of each
      block stand; the blocks follow the row, side by side. None: there are none.
  """

  ids: Array
  positions: Array
  segment_ids: Array = None
  response_mask: Array = None
  example_ids: Array = None
  is_noise: Array = None
  block_starts: Array = None
  block_columns: Array = None

  def map(self, function: Callable[[Array], Array]) -> "Batch":
    """The batch with `function` of each array that it has, without jax."""
    return Batch(*(None if x is None else function(x) for x in self))
