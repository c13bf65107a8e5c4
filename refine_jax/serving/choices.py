"""The answers of a request as its client gets them: text by pieces, and why each ended."""

import dataclasses
import time
from collections.abc import AsyncIterator

from refine_jax.decoding.requests import Answer, Request
from refine_jax.decoding.result import Pass
from refine_jax.serving.metrics import Metrics
from refine_jax.serving.refusals import Refused
from refine_jax.serving.scheduler import Scheduler
from refine_jax.serving.ticket import News, Ticket
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


def stream_ticket(requests: list[Request]) -> Ticket:
  """A ticket of rows whose text is made here, so that the engine's thread has no part in it."""
  bare = [dataclasses.replace(request, stops=(), follow=False) for request in requests]
  return Ticket(bare, streams=True)


async def pieces(
  ticket: Ticket,
  requests: list[Request],
  tokenizer: Tokenizer,
  scheduler: Scheduler,
  metrics: Metrics,
) -> AsyncIterator[tuple[Choice, str]]:
  """Yields a choice and the text that is new in it, until all have ended.

  Args:
    ticket: `stream_ticket` of the requests.

  Raises:
    Refused: nothing comes any more.
  """
  growing = [detokenize.GrowingAnswer(tokenizer, request.stops) for request in requests]
  choices = [Choice(index, request) for index, request in enumerate(requests)]
  heard = [ticket.submitted] * len(requests)
  while any(choice.reason is None for choice in choices):
    for index, news in _by_row(await ticket.news()).items():
      choice, known = choices[index], len(choices[index].text)
      if choice.reason is not None:
        continue  # a stop string was found in it
      now = time.perf_counter()
      measure = metrics.between_pieces if choice.tokens else metrics.first_token
      measure.observe(now - heard[index])
      heard[index] = now
      _take(choice, growing[index], news)
      if growing[index].stopped and not news[-1].answer:
        scheduler.cancel(ticket, index)
        metrics.ended(len(choice.request.prompt), len(choice.tokens), choice.passes)
      if len(choice.text) > known or choice.reason:
        yield choice, choice.text[known:]


def _take(choice: Choice, growing: detokenize.GrowingAnswer, news: list[News]) -> None:
  """Adds what came for a row to its choice."""
  answer = news[-1].answer
  reason = None if answer is None else _reason(answer)
  tokens = [token for one in news for token in one.tokens]
  growing.extend(tokens, answer is not None)
  choice.text, choice.tokens, choice.passes = growing.text, growing.tokens, news[-1].passes
  choice.reason = "stop" if growing.stopped else reason
  choice.trace = answer.trace if answer else None


def _by_row(news: list[News]) -> dict[int, list[News]]:
  rows: dict[int, list[News]] = {}
  for one in news:
    rows.setdefault(one.index, []).append(one)
  return rows


def _reason(answer: Answer) -> str:
  if answer.finish_reason == "not_finite":
    raise Refused(500, "The model's logits are not finite; its weights are damaged.")
  assert answer.finish_reason is not None
  return _REASONS[answer.finish_reason]
