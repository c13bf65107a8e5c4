"""The processes of one run: what they agree on, and how they end together.

A run on several hosts is the same program on each of them. What one of them sees alone (a file that
is missing, an error) has to be told to the others, or these wait for it without end.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from refine_jax.errors import UserError

_LONGEST = 2000  # bytes of a text that processes exchange


def several() -> bool:
  """Whether this run has more than one process."""
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the process that writes what is written once."""
  return jax.process_index() == 0


def from_first(value: Any) -> Any:
  """A number or numpy array of the first process, on all of them; all must call it.

  Args:
    value: of the same shape and dtype everywhere.
  """
  return multihost_utils.broadcast_one_to_all(np.asarray(value)) if several() else value


def gather(text: str) -> list[str]:
  """The text that each process gives, cut where it is long; all must call it."""
  if not several():
    return [text]
  data = np.zeros(_LONGEST, np.uint8)
  encoded = text.encode(errors="replace")[:_LONGEST]
  data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  rows = multihost_utils.process_allgather(data)
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextlib.contextmanager
def together() -> Iterator[None]:
  """No process leaves the block before all have come to its end; all must enter it.

  Raises:
    UserError: on every process, where the block raised one on any.
  """
  own: UserError | None = None
  try:
    yield
  except UserError as error:
    own = error
  texts = gather(str(own) if own else "")
  if own:
    raise own
  for index, text in enumerate(texts):
    if text:
      raise UserError(text if index == 0 else f"process {index}: {text}")


def whole(tree: Any) -> Any:
  """The tree with arrays that this process can read; all must call it.

  An array of which other processes hold parts becomes a host array, others stay.
  """

  def gathered(x):
    return x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gathered, tree)
