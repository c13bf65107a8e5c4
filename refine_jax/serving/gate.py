"""What every request passes: the API key, the log and the counters."""

import hashlib
import hmac
import logging
import re
import time
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refine_jax.serving import replies
from refine_jax.serving.metrics import Metrics
from refine_jax.serving.refusals import Refused
from refine_jax.serving.served import Served

_KEYLESS = ("/", "/health")
_LOCAL = re.compile(r"(localhost|127\.[\d.]+|\[::1\])(:\d+)?", re.IGNORECASE)
_LONGEST = 200  # characters of a path in the log
_log = logging.getLogger(__name__)


class Gate:
  """Middleware: asks for the key where there is one, counts, and writes a line a request."""

  def __init__(
    self, app: ASGIApp, *, served: Served, metrics: Metrics, paths: frozenset[str]
  ) -> None:
    """Wraps an application.

    Args:
      paths: those that are counted by name.
    """
    self._app, self._metrics, self._paths = app, metrics, paths
    self._key = _digest(served.api_key.encode()) if served.api_key else b""
    self._local = served.local

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
      refused = self._refused(scope)
      await (refusal(refused) if refused else self._app)(scope, receive, noting)
    except Exception:
      status = 500  # which is sent outside of here
      raise
    finally:
      self._note(scope, status, time.perf_counter() - start)

  def _refused(self, scope: Scope) -> Refused | None:
    """Why a request is not let through."""
    if self._local and not _LOCAL.fullmatch(_header(scope, b"host").decode("latin-1")):
      return Refused(403, "This server answers to localhost alone; start it with an API key.")
    if not self._key or scope["path"] in _KEYLESS:
      return None
    kind, _, key = _header(scope, b"authorization").partition(b" ")
    # Digests have one length, and comparing them takes one time.
    if hmac.compare_digest(_digest(key.strip()), self._key) and kind.lower() == b"bearer":
      return None
    return Refused(
      401,
      "The API key is missing or wrong; send it as Authorization: Bearer KEY.",
      code="invalid_api_key",
      headers={"WWW-Authenticate": "Bearer"},
    )

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


def _header(scope: Scope, name: bytes) -> bytes:
  """The first header of the name, or nothing."""
  return next((value for key, value in scope["headers"] if key == name), b"")
