"""The routes."""

import asyncio
import concurrent.futures
import contextlib
import functools
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from refine_jax.decoding import scores
from refine_jax.serving import choices as choices_lib
from refine_jax.serving import page, protocol, replies
from refine_jax.serving.choices import Choice
from refine_jax.serving.connection import (
  ClientGone,
  EventStream,
  out_of_time,
  read_body,
  while_connected,
)
from refine_jax.serving.gate import Gate, json_response, refusal
from refine_jax.serving.metrics import Metrics
from refine_jax.serving.protocol import Asked
from refine_jax.serving.refusals import Refused
from refine_jax.serving.scheduler import READY, Scheduler
from refine_jax.serving.served import Served
from refine_jax.serving.ticket import Ticket

_BODIES = 64  # that are read and parsed at a time
_PARSERS = 4  # threads


class Routes:
  """The endpoints of one server."""

  def __init__(self, served: Served, scheduler: Scheduler, metrics: Metrics) -> None:
    self._served, self._scheduler, self._metrics = served, scheduler, metrics
    self._bodies = asyncio.Semaphore(_BODIES)
    # Tokenizers and programs that score let go of the interpreter's lock.
    self._parsers = concurrent.futures.ThreadPoolExecutor(_PARSERS, "parse")
    self._scorer = concurrent.futures.ThreadPoolExecutor(1, "score")

  def close(self) -> None:
    """Ends the threads."""
    self._parsers.shutdown(wait=False, cancel_futures=True)
    self._scorer.shutdown(wait=False, cancel_futures=True)

  async def page(self, request: Request) -> Response:
    return page.response()

  async def health(self, request: Request) -> Response:
    state = self._scheduler.state
    return json_response({"status": state}, 200 if state == READY else 503)

  async def metrics(self, request: Request) -> Response:
    return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

  async def models(self, request: Request) -> Response:
    return json_response({"object": "list", "data": [self._model()]})

  async def model(self, request: Request) -> Response:
    if request.path_params["name"] != self._served.name:
      raise Refused(404, "There is no model of that name here.", code="model_not_found")
    return json_response(self._model())

  async def completions(self, request: Request) -> Response:
    return await self._answer(request, "completion")

  async def chat(self, request: Request) -> Response:
    return await self._answer(request, "chat")

  def _model(self) -> dict:
    served = self._served
    return {
      "id": served.name,
      "object": "model",
      "created": served.created,
      "owned_by": "refine_jax",
      "max_model_len": served.limits.context,
    }

  async def _answer(self, request: Request, kind: str) -> Response:
    limits = self._served.limits
    try:
      self._scheduler.check_room()
      async with self._bodies:
        body = await read_body(request, limits.body_bytes, limits.body_seconds)
        asked = await self._run(self._parsers, lambda: protocol.read(kind, self._served, body))
      wanted = asked.requests if asked.generates else []
      ticket = choices_lib.ticket_of(wanted, stream=asked.stream)
      if asked.stream:
        self._scheduler.submit(ticket)
        ended = functools.partial(self._scheduler.release, ticket)
        return EventStream(self._events(asked, ticket), limits.seconds, ended)
      self._scheduler.submit(ticket)
      try:
        async with asyncio.timeout(limits.seconds):
          return await while_connected(request.receive, self._whole(asked, ticket))
      except TimeoutError:
        raise out_of_time(limits.seconds) from None
      finally:
        self._scheduler.release(ticket)
    except ClientGone:
      return Response(status_code=499)

  async def _whole(self, asked: Asked, ticket: Ticket) -> Response:
    reply = replies.Reply(self._served, asked)
    if asked.generates:
      tokenizer = self._served.model.require_tokenizer()
      arguments = (ticket, asked.requests, tokenizer, self._scheduler)
      choices = await choices_lib.whole(*arguments)
    else:
      nothing = enumerate(asked.requests)
      choices = [Choice(index, one, reason="length") for index, one in nothing]
    if asked.logprobs is None:
      return json_response(reply.whole(choices, [None] * len(choices)))
    return await self._run(self._scorer, lambda: self._scored(reply, choices, asked.logprobs or 0))

  def _scored(self, reply: replies.Reply, choices: list[Choice], top: int) -> Response:
    """The response with log-probabilities; in the scorer's thread."""
    model = self._served.model
    texts = [[*choice.request.prompt, *choice.tokens] for choice in choices]
    found = [scores.score(model, ids, top) for ids in texts]
    return json_response(reply.whole(choices, found))

  async def _events(self, asked: Asked, ticket: Ticket) -> AsyncIterator[bytes]:
    reply = replies.Reply(self._served, asked)
    tokenizer = self._served.model.require_tokenizer()
    known: dict[int, Choice] = {}
    for chunk in reply.first():
      yield replies.event(chunk)
    arguments = (asked.requests, tokenizer, self._scheduler, self._metrics)
    async for choice, text in choices_lib.pieces(ticket, *arguments):
      known[choice.index] = choice
      yield replies.event(reply.piece(choice, text))
    for chunk in reply.last([known[index] for index in sorted(known)]):
      yield replies.event(chunk)
    yield replies.DONE

  async def _run(self, pool: concurrent.futures.Executor, function: Callable):
    return await asyncio.get_running_loop().run_in_executor(pool, function)


def make(
  served: Served, scheduler: Scheduler, metrics: Metrics, failed: Callable[[], None]
) -> Starlette:
  """The application.

  Args:
    failed: called when the engine failed.
  """
  routes = Routes(served, scheduler, metrics)
  table = {
    ("/", "GET"): routes.page,
    ("/health", "GET"): routes.health,
    ("/metrics", "GET"): routes.metrics,
    ("/v1/models", "GET"): routes.models,
    ("/v1/completions", "POST"): routes.completions,
    ("/v1/chat/completions", "POST"): routes.chat,
  }
  named = frozenset(path for path, _ in table)

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    scheduler.start(failed)
    try:
      yield
    finally:
      await asyncio.to_thread(scheduler.close)
      routes.close()

  return Starlette(
    routes=[
      *(Route(path, endpoint, methods=[method]) for (path, method), endpoint in table.items()),
      Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
    ],
    middleware=[Middleware(Gate, served=served, metrics=metrics, paths=named)],
    exception_handlers={
      Refused: _refused,
      HTTPException: _http_error,
      Exception: lambda _, error: refusal(Refused(500, "The server has a fault; see its log.")),
    },
    lifespan=lifespan,
  )


async def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  return refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  headers = dict(error.headers or {})
  return refusal(Refused(error.status_code, f"{error.detail}.", headers=headers))
