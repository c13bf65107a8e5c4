"""One call of `generate`: its prompts on their way through an engine, and what comes of them."""

from collections.abc import Iterable, Sequence

from refine_jax.decoding import pool
from refine_jax.decoding.loading import Model
from refine_jax.decoding.requests import Answer, Request
from refine_jax.decoding.result import Generation, Trace, token_texts
from refine_jax.decoding.runner import Costs
from refine_jax.errors import UserError
from refine_jax.interrupt import held_back

_ROWS_SHOWN = 8
_NOT_FINITE = "not_finite"


class Call:
  """Requests on their way through an engine of the model's."""

  def __init__(
    self, model: Model, requests: Sequence[Request], *, slots: int = 0, strict: bool = True
  ) -> None:
    """Submits the requests, which share what `Engine` says.

    Args:
      slots: how many rows decode at a time; 0: as many as suit the requests.
      strict: whether one row whose logits are not finite is an error, or only all of them.

    Raises:
      UserError: the device's memory is too small for them.
    """
    self.requests, self._model, self._strict = list(requests), model, strict
    self._answers: dict[Request, Answer] = {}
    self._engine = pool.take(model, self.requests, slots) if requests else None
    self._before = self._engine.costs if self._engine else Costs()
    self._spent: Costs | None = None  # once all is answered: the engine then serves other calls

  @property
  def busy(self) -> bool:
    """Whether an answer is missing."""
    return len(self._answers) < len(self.requests)

  def step(self, passes: int | None = None) -> list[Answer]:
    """Runs a step of the engine, and returns the answers that ended.

    Raises:
      UserError: logits of a row were not finite, or those of every row where not `strict`.
    """
    assert self._engine is not None
    self._engine.prepare()
    with held_back():  # what ended is ours before an interrupt comes
      ended = self._engine.step(passes)
      self._answers |= {answer.request: answer for answer in ended}
    if self._strict:
      _refuse_not_finite(ended)
    if not self.busy:
      if all(answer.finish_reason == _NOT_FINITE for answer in self._answers.values()):
        _refuse_not_finite(self._answers.values())
      self._spent = self._engine.costs.since(self._before)
      pool.give_back(self._engine)
    return ended

  def texts(self) -> list[str]:
    """What is certain of every text."""
    assert self._engine is not None
    return [
      (answer.text or "")
      if (answer := self._answers.get(request))
      else self._engine.certain_text(request)
      for request in self.requests
    ]

  def result(self) -> Generation:
    """The answers as far as they are, and their numbers."""
    if self._engine is None:
      return gathered(self._model, [], Costs())
    found = self._answers | (self._engine.progress() if self.busy else {})
    answers = [
      found.get(request) or Answer(request, [], "", None, 0, []) for request in self.requests
    ]
    return gathered(self._model, answers, self._spent or self._engine.costs.since(self._before))


def _refuse_not_finite(answers: Iterable[Answer]) -> None:
  bad = sorted(
    (answer.request.row + 1, len(answer.tokens))
    for answer in answers
    if answer.finish_reason == _NOT_FINITE
  )
  if bad:
    shown = ", ".join(f"{row}" for row, _ in bad[:_ROWS_SHOWN])
    more = f" and {len(bad) - _ROWS_SHOWN} more" if len(bad) > _ROWS_SHOWN else ""
    raise UserError(
      f"The model's logits are not finite (NaN or infinite) in prompt {shown}{more}, the first"
      f" time after {bad[0][1]} tokens of its answer; load the model with dtype=float32 or"
      " bfloat16, and if it stays so, its weights are damaged."
    )


def gathered(model: Model, answers: list[Answer], costs: Costs) -> Generation:
  """One Generation of answers, in their order."""
  counts = [answer.accepted for answer in answers if answer.accepted]
  passes = [answer.passes for answer in answers]
  trace = None
  if any(answer.request.options.trace for answer in answers):
    rows = [answer.trace or [] for answer in answers]
    ids = {t for row in rows for seen in row for t in seen.tokens}
    tokenizer = model.tokenizer
    prompts = [answer.request.prompt for answer in answers]
    texts = [str(p) if tokenizer is None else tokenizer.decode(p) for p in prompts]
    trace = Trace([list(row) for row in rows], texts, token_texts(tokenizer, ids))
  sure = None
  if any(answer.request.options.log_probabilities for answer in answers):
    sure = [answer.log_probabilities or [] for answer in answers]
  return Generation(
    log_probabilities=sure,
    prompts=[answer.request.prompt for answer in answers],
    tokens=[answer.tokens for answer in answers],
    texts=None if model.tokenizer is None else [answer.text or "" for answer in answers],
    passes=passes,
    stopped=[answer.stopped for answer in answers],
    not_finite=[i for i, answer in enumerate(answers) if answer.finish_reason == _NOT_FINITE],
    accepted=[sum(column) / max(sum(passes), 1) for column in zip(*counts, strict=True)],
    prefill_seconds=costs.prefill_seconds,
    decode_seconds=costs.decode_seconds,
    compile_seconds=costs.compile_seconds,
    programs=costs.programs,
    trace=trace,
  )
