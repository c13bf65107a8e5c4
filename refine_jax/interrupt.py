"""SIGTERM and SIGINT as a request to save and leave after the current step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
  """Catches the signals while entered; a second one ends the process at once.

  At once: by the system, without a word and whatever the process waits for, be it a save that goes
  on or a file system that does not answer.

  With several processes all must stop after the same step: JAX's preemption service, which
  catches SIGTERM itself, agrees on one. SIGINT is handed on to it.
  """

  def __init__(self) -> None:
    self._signal: int | None = None
    self._asked = self._agreed = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    caught = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
    self._previous = {s: signal.signal(s, self._handle) for s in caught}
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def requested(self, step: int) -> bool:
    """Whether to stop after `step` steps; with several processes once for each step."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self._agreed = True
      self._signal = self._signal or signal.SIGTERM
    return self.pending

  @property
  def pending(self) -> bool:
    """Whether to stop soon; with several processes, whether all know it."""
    if jax.process_count() > 1:
      return self._agreed
    return self._signal is not None or self._asked

  def ask(self) -> None:
    """Asks for a stop as a signal does; with several processes of all of them."""
    if not self._asked and jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    self._asked = True

  @property
  def name(self) -> str:
    return signal.Signals(self._caught).name

  @property
  def status(self) -> int:
    """The exit status that shells give to a process ended by the signal."""
    return 128 + self._caught

  @property
  def _caught(self) -> int:
    assert self._signal is not None
    return self._signal

  def _handle(self, number, _):
    self._signal = number
    for s in self._previous:
      signal.signal(s, signal.SIG_DFL)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def _restore(self):
    for s, handler in self._previous.items():
      signal.signal(s, handler)
    self._previous = {}


@contextlib.contextmanager
def held_back() -> Iterator[None]:
  """Puts an interrupt (SIGINT) off to the end of the block.

  Other threads than the main one get none anyway.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  asked = []
  before = signal.signal(signal.SIGINT, lambda *arguments: asked.append(arguments))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if asked and callable(before):
      before(*asked[0])
    elif asked and before is signal.SIG_DFL:
      signal.raise_signal(signal.SIGINT)
