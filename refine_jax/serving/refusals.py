"""What a client is told that gets no answer: a status and OpenAI's error body."""

from typing import Any


class Refused(Exception):
  """Why a request has no answer.

  Attributes:
    status: of HTTP.
    body: {"error": {"message", "type", "param", "code"}}.
    headers: further ones.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
  ) -> None:
    super().__init__(message)
    self.status, self.headers = status, headers or {}
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    self.body: dict[str, Any] = {
      "error": {"message": message, "type": kind, "param": param, "code": code}
    }


def too_long(message: str, param: str) -> Refused:
  """More tokens than the server's context has."""
  return Refused(400, message, param=param, code="context_length_exceeded")


def unavailable(message: str) -> Refused:
  """The server cannot answer now, and may later."""
  return Refused(503, message, code="unavailable", headers={"Retry-After": "5"})
