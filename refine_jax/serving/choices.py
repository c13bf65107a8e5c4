"""The answers of a request as its client gets them: text by pieces, and why each ended."""

import dataclasses
import time
from collections.abc import AsyncIterator

from refine_jax.decoding.requests import Answer, Request
from refine_jax.decoding.result import Pass
from refine_jax.serving.metrics import Metrics
from refine_jax.serving.refusals import Refused
from refine_jax.serving.scheduler import Scheduler
from refine_jax.serving.ticket import Ticket, Update
from refine_jax.text import detokenize
from refine_jax.text.tokenizer import Tokenizer

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclasses.dataclass
class Choice:
  """One answer.

  Attributes:
    index: as in the protocol.
    request: of the engine.
    text, tokens, passes: so far.
    reason: "stop" or "length" once it has ended.
    trace: its passes, where they were asked for and it has ended.
  """

  index: int
  request: Request
  text: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  passes: int = 0
  reason: str | None = None
  trace: list[Pass] | None = None

  def end(self, answer: Answer) -> None:
    """Takes over what the engine says of the whole answer.

    Raises:
      Refused: the model failed on it.
    """
    self.reason = _reason(answer)
    self.text, self.tokens, self.passes = answer.text or "", answer.tokens, answer.passes
    self.trace = answer.trace


def ended(answers: list[Answer]) -> list[Choice]:
  """The choices of answers that are there as a whole.

  Raises:
    Refused: the model failed on one of them.
  """
  choices = [Choice(index, answer.request) for index, answer in enumerate(answers)]
  for choice, answer in zip(choices, answers, strict=True):
    choice.end(answer)
  return choices


def ticket_of(requests: list[Request], *, stream: bool) -> Ticket:
  """A ticket of rows. A text that is looked at before its end is made here, not by the engine.

  So the engine's thread has no part in it, and a row runs on for the rest of a step after its stop
  string. Traces are the engine's, so those rows keep their stop strings.
  """
  watched = stream or any(request.stops for request in requests)
  bare = [
    request if request.options.trace else dataclasses.replace(request, stops=())
    for request in requests
  ]
  return Ticket(bare if watched else requests, streams=watched)


async def whole(
  ticket: Ticket, requests: list[Request], tokenizer: Tokenizer, scheduler: Scheduler
) -> list[Choice]:
  """The choices, once all have ended.

  Raises:
    Refused: the model failed on one of them, or nothing comes any more.
  """
  if not ticket.streams:
    return ended(await ticket.answers())
  found = {c.index: c async for c, _ in pieces(ticket, requests, tokenizer, scheduler)}
  return [found[index] for index in range(len(requests))]


async def pieces(
  ticket: Ticket,
  requests: list[Request],
  tokenizer: Tokenizer,
  scheduler: Scheduler,
  metrics: Metrics | None = None,
) -> AsyncIterator[tuple[Choice, str]]:
  """Yields a choice and the text that is new in it, until all have ended.

  Args:
    ticket: `ticket_of` the requests.
    metrics: where the times of pieces are counted.

  Raises:
    Refused: nothing comes any more.
  """
  growing = [detokenize.GrowingAnswer(tokenizer, request.stops) for request in requests]
  choices = [Choice(index, request) for index, request in enumerate(requests)]
  heard = [ticket.submitted] * len(requests)
  while any(choice.reason is None for choice in choices):
    for index, updates in _by_row(await ticket.updates()).items():
      choice, known = choices[index], len(choices[index].text)
      if choice.reason is not None:
        continue  # a stop string was found in it
      if metrics:
        now = time.perf_counter()
        measure = metrics.between_pieces if choice.tokens else metrics.first_token
        measure.observe(now - heard[index])
        heard[index] = now
      _take(choice, growing[index], updates)
      if growing[index].stopped and not updates[-1].answer:
        scheduler.end(ticket, index, len(choice.tokens), choice.passes)
      if len(choice.text) > known or choice.reason:
        yield choice, choice.text[known:]


def _take(choice: Choice, growing: detokenize.GrowingAnswer, updates: list[Update]) -> None:
  """Adds what came for a row to its choice."""
  answer = updates[-1].answer
  reason = None if answer is None else _reason(answer)
  tokens = [token for one in updates for token in one.tokens]
  growing.extend(tokens, answer is not None)
  choice.text, choice.tokens, choice.passes = growing.text, growing.tokens, updates[-1].passes
  choice.reason = "stop" if growing.stopped else reason
  choice.trace = answer.trace if answer else None


def _by_row(updates: list[Update]) -> dict[int, list[Update]]:
  rows: dict[int, list[Update]] = {}
  for one in updates:
    rows.setdefault(one.index, []).append(one)
  return rows


def _reason(answer: Answer) -> str:
  if answer.finish_reason == "not_finite":
    raise Refused(500, "The model's logits are not finite; its weights are damaged.")
  assert answer.finish_reason is not None
  return _REASONS[answer.finish_reason]
