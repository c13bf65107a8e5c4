"""Rows that have ended and whose answers are not made yet."""

from collections.abc import Iterable
from typing import NamedTuple

import jax

from refine_jax.decoding.dispatch import Rows
from refine_jax.decoding.requests import Answer, Request, Row


class Ended(NamedTuple):
  """A row that has ended, the slot that it had, and its tokens, the prompt's among them."""

  row: Row
  slot: int
  length: int


class Unread:
  """Rows that ended in a step: their answers are made while the device runs the next one."""

  def __init__(self) -> None:
    self._ended: list[Ended] = []
    self._rows: Rows | None = None

  def __bool__(self) -> bool:
    return bool(self._ended)

  def add(self, ended: Iterable[Ended], rows: Rows) -> None:
    """Keeps them; there are none yet.

    Args:
      rows: of the pass after which they had ended.
    """
    self._ended, self._rows = list(ended), rows

  def drop(self, request: Request) -> None:
    """Forgets a request's row, if it is here."""
    self._ended = [ended for ended in self._ended if ended.row.request is not request]

  def take(self) -> list[Answer]:
    """Makes the answers."""
    ended, rows = self._ended, self._rows
    self._ended, self._rows = [], None
    if not ended:
      return []
    tokens, accepted, sure = jax.device_get(rows)
    answers = []
    for row, slot, length in ended:
      row.see(tokens[slot, len(row.request.prompt) : length].tolist(), True, sure, slot)
      answers.append(row.answer(True, accepted[slot].tolist()))
    return answers
