"""What every request passes: the API key, the log and the counters."""

import hashlib
import hmac
import logging
import time
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refine_jax.serving import replies
from refine_jax.serving.metrics import Metrics
from refine_jax.serving.refusals import Refused

_KEYLESS = ("/", "/health")
_LONGEST = 200  # characters of a path in the log
_log = logging.getLogger(__name__)


class Gate:
  """Middleware: asks for the key where there is one, counts, and writes a line a request."""

  def __init__(
    self, app: ASGIApp, *, api_key: str, metrics: Metrics, paths: frozenset[str]
  ) -> None:
    """Wraps an application.

    Args:
      api_key: "" where anybody may ask.
      paths: those that are counted by name.
    """
    self._app, self._metrics, self._paths = app, metrics, paths
    self._key = _digest(api_key.encode()) if api_key else b""

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    start, status = time.perf_counter(), 0

    async def noting(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      if self._may(scope):
        await self._app(scope, receive, noting)
      else:
        await _no_key(scope, receive, noting)
    except Exception:
      status = 500  # which is sent outside of here
      raise
    finally:
      self._note(scope, status, time.perf_counter() - start)

  def _may(self, scope: Scope) -> bool:
    if not self._key or scope["path"] in _KEYLESS:
      return True
    given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
    kind, _, key = given.partition(b" ")
    # Digests have one length, and comparing them takes one time.
    same = hmac.compare_digest(_digest(key.strip()), self._key)
    return same and kind.lower() == b"bearer"

  def _note(self, scope: Scope, status: int, seconds: float) -> None:
    path = scope["path"]
    name = path if path in self._paths else "other"
    self._metrics.http.labels(name, str(status)).inc()
    self._metrics.seconds.labels(name).observe(seconds)
    # ascii() escapes what could end a line or act on a terminal; headers are not written at all.
    client = (scope.get("client") or ("-",))[0]
    method = ascii(scope["method"][:16])[1:-1]
    shown = ascii(path[:_LONGEST])
    _log.info("%s %s %s %s %.1f ms", client, method, shown, status or "gone", seconds * 1e3)


def json_response(value: dict, status: int = 200, headers: Any = None) -> Response:
  """A response of JSON."""
  return Response(replies.encoded(value), status, headers, "application/json")


def refusal(error: Refused) -> Response:
  """A response with OpenAI's error body."""
  return json_response(error.body, error.status, error.headers)


def _digest(key: bytes) -> bytes:
  return hashlib.sha256(key).digest()


async def _no_key(scope: Scope, receive: Receive, send: Send) -> None:
  error = Refused(
    401,
    "The API key is missing or wrong; send it as Authorization: Bearer KEY.",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
  )
  await refusal(error)(scope, receive, send)
