"""One call of `generate`: its prompts on their way through an engine, and what comes of them."""

from collections.abc import Iterable, Sequence

from refine_jax.decoding import pool
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import Answer, Request, requests
from refine_jax.decoding.result import Generation, Trace, token_texts
from refine_jax.decoding.runner import Costs
from refine_jax.errors import UserError

_ROWS_SHOWN = 8


class Call:
  """Prompts on their way through an engine of the model's."""

  def __init__(
    self, model: Model, prompts: Sequence, options: Options, *, slots: int, follow: bool
  ) -> None:
    self.requests = requests(model, _listed(prompts), options, follow=follow)
    self._model, self._options = model, options
    self._answers: dict[Request, Answer] = {}
    self._engine = pool.take(model, options, self.requests, slots) if self.requests else None
    if self._engine is not None:
      self._before = self._engine.costs
      for request in self.requests:
        self._engine.submit(request)

  @property
  def busy(self) -> bool:
    """Whether an answer is missing."""
    return len(self._answers) < len(self.requests)

  def step(self, passes: int | None = None) -> None:
    """Runs a step of the engine.

    Raises:
      UserError: logits of a row were not finite.
    """
    assert self._engine is not None
    ended = self._engine.step(passes)
    self._answers |= {answer.request: answer for answer in ended}
    _refuse_not_finite(ended)
    if not self.busy:
      pool.give_back(self._engine)

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
      return _gathered(self._model, [], self._options, None)
    found = self._answers | (self._engine.progress() if self.busy else {})
    answers = [
      found.get(request) or Answer(request, [], "", None, 0, []) for request in self.requests
    ]
    return _gathered(self._model, answers, self._options, self._engine.costs.since(self._before))


def _refuse_not_finite(answers: Iterable[Answer]) -> None:
  bad = sorted(
    (answer.request.row + 1, len(answer.tokens))
    for answer in answers
    if answer.finish_reason == "not_finite"
  )
  if bad:
    shown = ", ".join(f"{row}" for row, _ in bad[:_ROWS_SHOWN])
    more = f" and {len(bad) - _ROWS_SHOWN} more" if len(bad) > _ROWS_SHOWN else ""
    raise UserError(
      f"The model's logits are not finite (NaN or infinite) in prompt {shown}{more}, the first"
      f" time after {bad[0][1]} tokens of its answer; load the model with dtype=float32 or"
      " bfloat16, and if it stays so, its weights are damaged."
    )


def _listed(prompts) -> list:
  if isinstance(prompts, str) or not isinstance(prompts, Iterable):
    raise UserError(f"prompts is {prompts!r}; give a list of prompts.")
  return list(prompts)


def _gathered(
  model: Model, answers: list[Answer], options: Options, costs: Costs | None
) -> Generation:
  """One Generation of a call's answers, in the order of its prompts."""
  counts = [answer.accepted for answer in answers if answer.accepted]
  passes = [answer.passes for answer in answers]
  trace = None
  if options.trace:
    rows = [answer.trace or [] for answer in answers]
    ids = {t for row in rows for seen in row for t in seen.tokens}
    tokenizer = model.tokenizer
    prompts = [answer.request.prompt for answer in answers]
    texts = [str(p) if tokenizer is None else tokenizer.decode(p) for p in prompts]
    trace = Trace([list(row) for row in rows], texts, token_texts(tokenizer, ids))
  return Generation(
    prompts=[answer.request.prompt for answer in answers],
    tokens=[answer.tokens for answer in answers],
    texts=None if model.tokenizer is None else [answer.text or "" for answer in answers],
    passes=passes,
    stopped=[answer.stopped for answer in answers],
    accepted=[sum(column) / max(sum(passes), 1) for column in zip(*counts, strict=True)],
    prefill_seconds=costs.prefill_seconds if costs else 0.0,
    decode_seconds=costs.decode_seconds if costs else 0.0,
    compile_seconds=costs.compile_seconds if costs else 0.0,
    programs=costs.programs if costs else 0,
    trace=trace,
  )
