"""Rows that have ended and whose answers are not made yet."""

from collections.abc import Mapping

import jax
import numpy as np

from refine_jax.decoding.dispatch import Rows
from refine_jax.decoding.requests import Answer, Request, Row


class Unread:
  """Rows that ended in a step: their answers are made once the next one is started."""

  def __init__(self) -> None:
    self._ended: dict[int, Row] = {}
    self._lengths = np.zeros(0, np.int32)
    self._rows: Rows | None = None

  def __bool__(self) -> bool:
    return bool(self._ended)

  def add(self, ended: Mapping[int, Row], lengths: np.ndarray, rows: Rows) -> None:
    """Keeps rows by their slots; there are none here.

    Args:
      lengths, rows: of all slots, after the pass in which these ended.
    """
    self._ended, self._lengths, self._rows = dict(ended), lengths, rows

  def drop(self, request: Request) -> None:
    """Forgets a request's row, if it is here."""
    self._ended = {s: row for s, row in self._ended.items() if row.request is not request}

  def take(self) -> list[Answer]:
    """Makes the answers."""
    ended, rows = self._ended, self._rows
    self._ended, self._rows = {}, None
    if not ended:
      return []
    tokens, accepted, sure = jax.device_get(rows)
    answers = []
    for slot, row in ended.items():
      new = tokens[slot, len(row.request.prompt) : self._lengths[slot]].tolist()
      row.see(new, True, sure, slot)
      answers.append(row.answer(True, accepted[slot].tolist()))
    return answers
