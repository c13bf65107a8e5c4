"""What goes on between a server and one client: a body in bounds, and a client that leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from refine_jax.serving import replies
from refine_jax.serving.refusals import Refused

T = TypeVar("T")
_LAST_WORDS = 2.0  # seconds
_EVENTS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
  """The client has closed its connection, and waits for nothing."""


async def read_body(request: Request, most: int, seconds: float) -> bytes:
  """The body of a JSON request.

  Args:
    most: bytes.
    seconds: in which it has to come.

  Raises:
    Refused: it is no JSON by its header, too long, or too slow.
    ClientGone: it ended before its end.
  """
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  # A page of another origin can send other types without asking, and this one not.
  if kind != "application/json":
    raise Refused(415, "The body must be JSON; send Content-Type: application/json.")
  body, size, close = bytearray(), 0, {"Connection": "close"}
  too_large = Refused(413, f"The body is larger than {most} bytes.", headers=close)
  try:
    async with asyncio.timeout(seconds):
      async for chunk in request.stream():
        size += len(chunk)
        # The rest is read and dropped: clients that still send would not see the answer.
        if size <= most:
          body += chunk
        else:
          body.clear()
  except TimeoutError:
    if size > most:
      raise too_large from None
    message = f"The body did not come within {seconds:g} s."
    raise Refused(408, message, headers=close) from None
  except ClientDisconnect:
    raise ClientGone from None
  if size > most:
    raise too_large
  return bytes(body)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
  """The result of the work, which is cancelled when the client leaves.

  Raises:
    ClientGone: it left.
  """
  task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
  try:
    await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientGone
    return task.result()
  finally:
    for one in (task, watcher):
      one.cancel()
    await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass


class EventStream(Response):
  """Server-sent events; an error after the first of them is an event too."""

  def __init__(
    self, events: AsyncIterator[bytes], seconds: float, ended: Callable[[], None]
  ) -> None:
    """Makes a response.

    Args:
      seconds: in which all has to be written, slow readers included.
      ended: called in the end, whatever that is.
    """
    super().__init__(None, 200, _EVENTS, "text/event-stream")
    del self.headers["content-length"]
    self._events, self._seconds, self._ended = events, seconds, ended

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await while_connected(receive, self._write(send))
    except ClientGone:
      pass
    finally:
      self._ended()

  async def _write(self, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def write(body: bytes, more: bool = True) -> None:
      await send({"type": "http.response.body", "body": body, "more_body": more})

    try:
      async with asyncio.timeout(self._seconds):
        async for one in self._events:
          await write(one)
        await write(b"", False)
    except (Refused, TimeoutError) as error:
      why = error if isinstance(error, Refused) else out_of_time(self._seconds)
      # One that does not read has no use for it either.
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS):
          await write(replies.event(why.body))
          await write(b"", False)


def out_of_time(seconds: float) -> Refused:
  """What a client is told whose answer takes too long."""
  message = f"The answer took more than {seconds:g} s (--seconds); ask for fewer tokens."
  return Refused(504, message, code="timeout")
