"""A server's life: it listens, warms up, answers, and at SIGTERM ends what it has begun."""

import asyncio
import logging
import signal
import socket

import uvicorn

from refine_jax.decoding.engine import Engine
from refine_jax.errors import UserError
from refine_jax.serving import app
from refine_jax.serving.metrics import Metrics
from refine_jax.serving.scheduler import FAILED, Scheduler
from refine_jax.serving.served import Served

_AFTER_GRACE = 5  # seconds for errors to be written
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
  """A uvicorn server that ends its streams itself.

  Attributes:
    scheduler: of the engine.
  """

  def __init__(self, served: Served, engine: Engine) -> None:
    metrics = Metrics()
    self.scheduler = Scheduler(engine, served.limits, metrics)
    self._grace = served.limits.grace
    config = uvicorn.Config(
      app.make(served, self.scheduler, metrics, failed=self.end),
      # h11 bounds the size of headers.
      http="h11",
      ws="none",
      lifespan="on",
      log_config=None,
      access_log=False,
      server_header=False,
      # More than a proxy keeps an idle connection (nginx: 60 s), which then closes it first.
      timeout_keep_alive=75,
      timeout_graceful_shutdown=int(self._grace) + _AFTER_GRACE,
    )
    super().__init__(config)

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    """Ends it: nothing is accepted, what runs has the time of grace, and then gets an error."""
    self.scheduler.drain()
    timer = asyncio.get_running_loop().call_later(self._grace, self.scheduler.abort)
    await super().shutdown(sockets)
    timer.cancel()

  def end(self) -> None:
    """Asks for the end."""
    self.should_exit = True


def run(served: Served, engine: Engine, place: socket.socket) -> int:
  """Serves until a signal comes; returns the exit status.

  Args:
    place: bound, and not listening.

  Raises:
    UserError: the engine failed.
  """
  server = Server(served, engine)
  # uvicorn has its own while it runs, and in the end raises the signal once more: for status 0.
  signal.signal(signal.SIGTERM, lambda *_: server.end())
  host, port, *_ = place.getsockname()
  shown = f"[{host}]" if ":" in host else host
  _log.info(
    "%s at http://%s:%d/ (%d slots of %d tokens, mode %s, blocks of %d)",
    ascii(served.name),
    *(shown, port, engine.slots, engine.context),
    *(served.options.mode, engine.settings.block),
  )
  server.run(sockets=[place])
  if server.scheduler.state == FAILED:
    raise UserError(f"The engine failed: {server.scheduler.error}")
  return 0
