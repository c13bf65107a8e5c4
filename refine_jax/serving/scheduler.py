"""The one thread that has the engine: it takes rows in, runs steps, hands out what they bring."""

import asyncio
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Callable

from refine_jax.decoding.engine import Engine
from refine_jax.decoding.requests import Request
from refine_jax.errors import UserError
from refine_jax.serving.metrics import Metrics
from refine_jax.serving.refusals import Refused, unavailable
from refine_jax.serving.served import Limits
from refine_jax.serving.ticket import Ticket, Update

WARMING, READY, DRAINING, FAILED = "warming up", "ready", "shutting down", "failed"
# Rows enter and leave between two steps, and pieces come after each, so steps are kept to about so
# many seconds.
_STEP_SECONDS, _MOST_PASSES = 0.05, 32
# Seconds after which a thread that computes lets another one on. The default is 5 ms, which the
# engine's would wait several times a step while texts are made.
_SWITCH_SECONDS = 2e-4
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Row:
  ticket: Ticket
  index: int
  sent: int = 0  # tokens that were handed out


class Scheduler:
  """Answers tickets in an engine's slots.

  Attributes:
    state: WARMING, READY, DRAINING or FAILED.
    error: why it failed.
  """

  def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
    self.state, self.error = WARMING, ""
    self._engine, self._limits, self._metrics = engine, limits, metrics
    self._wake = threading.Condition()
    # Guarded by it: what the thread is to take over.
    self._incoming: list[Ticket] = []
    self._leaving: list[tuple[Ticket, int | None]] = []
    self._closing = False
    self._open: dict[Ticket, int] = {}  # rows of tickets that were not released; of the event loop
    self._rows: dict[Request, _Row] = {}  # of the thread
    self._passes = 1
    self._seconds_a_row = 1.0
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._loop: asyncio.AbstractEventLoop | None = None
    self._failed: Callable[[], None] = lambda: None
    metrics.watch(self.open_rows, lambda: len(self._rows), engine.slots)

  # The event loop's side.

  def start(self, failed: Callable[[], None]) -> None:
    """Starts the thread, which warms the engine up; `failed` is called in the loop if it fails."""
    self._loop, self._failed = asyncio.get_running_loop(), failed
    sys.setswitchinterval(_SWITCH_SECONDS)
    self._thread.start()

  def open_rows(self) -> int:
    """Rows that were submitted and whose tickets were not released."""
    return sum(self._open.values())

  def check_room(self, rows: int = 1) -> None:
    """Raises Refused where so many rows cannot be taken now."""
    if self.state != READY:
      raise unavailable(f"The server is {self.state}.")
    waiting = self.open_rows() + rows - self._engine.slots
    if waiting > self._limits.queue:
      seconds = self._seconds_a_row * max(waiting, 1) / self._engine.slots
      headers = {"Retry-After": str(min(max(round(seconds), 1), 60))}
      message = f"{self._limits.queue} answers wait already; come again later."
      raise Refused(429, message, code="rate_limit_exceeded", headers=headers)

  def submit(self, ticket: Ticket) -> None:
    """Takes a ticket, which is to be released in the end.

    Raises:
      Refused: there is no room, the server does not answer now, or the engine cannot answer it.
    """
    self.check_room(len(ticket.requests))
    for request in ticket.requests:
      try:
        self._engine.check(request)
      except UserError as error:
        raise Refused(400, str(error)) from error
    self._open[ticket] = len(ticket.requests)
    self._tell(lambda: self._incoming.append(ticket))

  def release(self, ticket: Ticket) -> None:
    """Ends what there still is of a ticket: its slots are free before the next step."""
    if self._open.pop(ticket, None) is not None:
      self._tell(lambda: self._leaving.append((ticket, None)))

  def end(self, ticket: Ticket, index: int, tokens: int, passes: int) -> None:
    """Ends one row of a ticket, whose answer is so many tokens after so many passes."""
    self._metrics.ended(len(ticket.requests[index].prompt), tokens, passes)
    self._tell(lambda: self._leaving.append((ticket, index)))

  def drain(self) -> None:
    """Refuses new tickets from here on."""
    if self.state in (WARMING, READY):
      self.state = DRAINING

  def abort(self) -> None:
    """Ends all tickets with an error."""
    for ticket in list(self._open):
      ticket.fail(unavailable("The server is shutting down."))

  def close(self) -> None:
    """Ends the thread, after the step that it is in."""
    self._closing = True
    self._tell(lambda: None)
    if self._thread.is_alive():
      self._thread.join(self._limits.grace)

  def _tell(self, change: Callable[[], None]) -> None:
    with self._wake:
      change()
      self._wake.notify()

  # The thread's side.

  def _run(self) -> None:
    try:
      self._warm_up()
      while self._wait():
        self._step()
    except BaseException as error:
      self.state, self.error = FAILED, str(error) or type(error).__name__
      _log.critical("The engine failed.", exc_info=not isinstance(error, UserError))
      self._call(self._fail_all)

  def _warm_up(self) -> None:
    start = time.perf_counter()
    context = self._limits.context
    for traced in (False, True) if self._limits.trace_tokens else (False,):
      for samples in (False, True):
        if self._closing:
          return
        self._engine.warm_up(context, traced=traced, samples=samples)
    if self.state == WARMING:
      self.state = READY
      _log.info("Ready after %.1f s.", time.perf_counter() - start)

  def _wait(self) -> bool:
    """Takes over what came in, and returns once there is something to do; False: the end."""
    with self._wake:
      while not (self._closing or self._incoming or self._leaving or self._engine.busy):
        self._wake.wait()
      incoming, self._incoming = self._incoming, []
      leaving, self._leaving = self._leaving, []
    free = len(self._rows) < self._engine.slots
    for ticket in incoming:
      for index, request in enumerate(ticket.requests):
        self._rows[request] = _Row(ticket, index)
        self._engine.submit(request)
    for ticket, index in leaving:
      for request in ticket.requests if index is None else [ticket.requests[index]]:
        if self._rows.pop(request, None) is not None:
          self._engine.cancel(request)
          if index is None:
            self._metrics.cancelled.inc()
    # The first piece of a stream does not wait for several passes.
    if free and any(ticket.streams for ticket in incoming):
      self._passes = 1
    return not self._closing

  def _step(self) -> None:
    if not self._engine.busy:
      return
    start = time.perf_counter()
    answers = self._engine.step(self._passes)
    self._adapt(time.perf_counter() - start)
    updates = []
    for answer in answers:
      row = self._rows.pop(answer.request)
      self._metrics.ended(len(answer.request.prompt), len(answer.tokens), answer.passes)
      seconds = time.perf_counter() - row.ticket.submitted
      self._seconds_a_row += (seconds - self._seconds_a_row) / 16
      new = answer.tokens[row.sent :]
      updates.append((row.ticket, Update(row.index, new, answer.passes, answer)))
    known = {request: row.sent for request, row in self._rows.items() if row.ticket.streams}
    for request, (tokens, count) in self._engine.new_tokens(known).items() if known else ():
      row = self._rows[request]
      if tokens:
        row.sent += len(tokens)
        updates.append((row.ticket, Update(row.index, tokens, count)))
    if updates:
      self._call(lambda: [ticket.deliver(one) for ticket, one in updates])

  def _adapt(self, seconds: float) -> None:
    if seconds > 1.5 * _STEP_SECONDS:
      self._passes = max(self._passes // 2, 1)
    elif seconds < _STEP_SECONDS / 1.5:
      self._passes = min(self._passes * 2, _MOST_PASSES)

  def _call(self, function: Callable[[], object]) -> None:
    assert self._loop is not None
    if not self._loop.is_closed():
      self._loop.call_soon_threadsafe(function)

  def _fail_all(self) -> None:
    for ticket in list(self._open):
      ticket.fail(Refused(500, "The engine failed; the server ends."))
    self._failed()
