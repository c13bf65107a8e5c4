"""A request of HTTP on its way through the engine: its rows, and what steps brought of them."""

import asyncio
import time
from typing import NamedTuple

from refine_jax.decoding.requests import Answer, Request
from refine_jax.serving.refusals import Refused


class Update(NamedTuple):
  """What a step of the engine brought for a row.

  Attributes:
    index: of the row in its ticket.
    tokens: new ones; none where the ticket does not stream.
    passes: that the row took part in so far.
    answer: the whole of it, once it has ended.
  """

  index: int
  tokens: list[int]
  passes: int
  answer: Answer | None = None


class Ticket:
  """Rows that were submitted together. It belongs to the event loop; the engine's thread reads it.

  Attributes:
    requests: of the engine.
    streams: whether tokens are wanted as they come.
    submitted: when, by time.perf_counter.
  """

  def __init__(self, requests: list[Request], *, streams: bool) -> None:
    self.requests, self.streams = requests, streams
    self.submitted = time.perf_counter()
    self._updates: list[Update] = []
    self._failure: Refused | None = None
    self._changed = asyncio.Event()

  def deliver(self, update: Update) -> None:
    """Adds an update, in the event loop."""
    self._updates.append(update)
    self._changed.set()

  def fail(self, why: Refused) -> None:
    """Has the next `updates` raise; in the event loop."""
    self._failure = why
    self._changed.set()

  async def updates(self) -> list[Update]:
    """All that came since the last call, at least one.

    Raises:
      Refused: nothing comes any more.
    """
    while not self._updates:
      if self._failure:
        raise self._failure
      await self._changed.wait()
      self._changed.clear()
    updates, self._updates = self._updates, []
    return updates

  async def answers(self) -> list[Answer]:
    """The answers of all rows, once all are there.

    Raises:
      Refused: nothing comes any more.
    """
    found: dict[int, Answer] = {}
    while len(found) < len(self.requests):
      found |= {one.index: one.answer for one in await self.updates() if one.answer}
    return [found[index] for index in range(len(self.requests))]
